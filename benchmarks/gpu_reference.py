"""What others reach on the same model and shape: the documented Hugging Face recipe, and Unsloth on one card.

`gpu_reference.py hf MODEL OUT STEPS CHECKPOINTING` under `accelerate launch` (FSDP1 or FSDP2 by its configuration), and
`gpu_reference.py unsloth MODEL OUT STEPS` in one process. Both append one line of JSON to OUT.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_shapes import words_tokenizer

T0 = float(os.environ["T0"])
MICRO_BATCH, LENGTH, WARM = 4, 2048, 4
RANK = int(os.environ.get("RANK", "0"))


def report(out: str, name: str, durations: list[float], first: float) -> None:
    """Median step after the warm-up, tokens a second, peak memory."""
    import torch

    steady = sorted(durations[WARM:])
    median = steady[len(steady) // 2]
    result = {
        "name": name,
        "rank": RANK,
        "step_s": round(median, 4),
        "tok_s": round(MICRO_BATCH * LENGTH / median, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "start_s": round(first, 2),
    }
    with open(out, "a") as file:
        file.write(json.dumps(result) + "\n")
    if RANK == 0:
        print(json.dumps(result), flush=True)


def hf_arguments(steps: int, checkpointing: bool) -> Any:
    """What SFTTrainer is told under FSDP1 or FSDP2."""
    from trl import SFTConfig

    reentrant = os.environ.get("FSDP_VERSION", "1") != "2"
    return SFTConfig(
        output_dir=os.environ.get("TMPDIR", "/tmp") + "/reference",
        per_device_train_batch_size=MICRO_BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        bf16=True,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
        logging_steps=1000,
        report_to="none",
        save_strategy="no",
        max_length=LENGTH,
        packing=False,
        optim="adamw_torch_fused",
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )


def run_hf(model_dir: str, out: str, steps: int, checkpointing: bool) -> None:
    """TRL's SFTTrainer with peft and bitsandbytes, as PEFT's documentation of FSDP + QLoRA has it."""
    import numpy as np
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTTrainer

    arguments = hf_arguments(steps, checkpointing)  # before the model: it joins the group that loading asks for
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    ids = np.random.default_rng(0).integers(4, 100_000, size=(steps * MICRO_BATCH * world_size + 8, LENGTH))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    durations: list[float] = []
    first: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.begun = time.time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize()
            durations.append(time.time() - self.begun)
            first.append(time.time() - T0)
            if len(durations) == WARM:
                torch.cuda.reset_peak_memory_stats()

    SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=words_tokenizer(),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM", bias="none"
        ),
        callbacks=[Clock()],
    ).train()
    report(out, os.environ["REFERENCE_NAME"], durations, first[0])


def run_unsloth(model_dir: str, out: str, steps: int, checkpointing: bool) -> None:
    """Unsloth's model and fused AdamW; `checkpointing` is its own, offloaded kind."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel  # isort: skip  # patches transformers: must come first
    import torch

    if not (Path(model_dir) / "tokenizer.json").exists():
        words_tokenizer().save_pretrained(model_dir)
    model, _ = FastLanguageModel.from_pretrained(
        model_dir, max_seq_length=LENGTH, load_in_4bit=True, dtype=torch.bfloat16, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        random_state=0,
        max_seq_length=LENGTH,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    model.train()
    generator = torch.Generator().manual_seed(0)
    durations: list[float] = []
    first = 0.0
    for step in range(steps):
        ids = torch.randint(0, 100_000, (MICRO_BATCH, LENGTH), generator=generator).cuda()
        begun = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        durations.append(time.time() - begun)
        if step == 0:
            first = time.time() - T0
        if step == WARM:
            torch.cuda.reset_peak_memory_stats()
    report(out, os.environ["REFERENCE_NAME"], durations, first)


if __name__ == "__main__":
    kind, folder, target, count, recompute = sys.argv[1:6]
    {"hf": run_hf, "unsloth": run_unsloth}[kind](folder, target, int(count), recompute == "1")
