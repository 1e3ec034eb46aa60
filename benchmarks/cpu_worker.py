"""One side of the CPU benchmark, in a process of its own: `cpu_worker.py ours|trl FOLDER STEPS`; prints a line of JSON.

Both sides train the same checkpoint, NF4 with double quantization in bfloat16, r = 16 on all linears, AdamW, on the
same token ids in the same batches; a step's time is from its first forward pass to the end of the optimizer's step.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

MICRO_BATCH, WARM = 2, 1
LENGTH = int(os.environ.get("BENCH_LENGTH", "256"))  # tokens a sequence


class Peak(threading.Thread):
    """The largest anonymous memory of this process, in bytes, from `start` on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = max(self.bytes, *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon")))
            time.sleep(0.02)


def token_ids(steps: int, vocabulary: int) -> torch.Tensor:
    """(steps, MICRO_BATCH, LENGTH)."""
    return torch.randint(4, vocabulary, (steps, MICRO_BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def run_ours(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    from gpu_shapes import train_config

    from qlora_trainer.loader import ensure_packed
    from qlora_trainer.model import build_model
    from qlora_trainer.optim import Optimizer
    from qlora_trainer.sources import Source

    cpu = torch.device("cpu")
    config = train_config(training={"max_length": LENGTH, "gradient_checkpointing": "none"})
    base = Source(path=folder, files=[], digest=folder.name)
    model = build_model(config, ensure_packed(config, base, folder / "cache", cpu), None, cpu, MICRO_BATCH)
    model.verify()
    optimizer = Optimizer(config, model.adapter, 1)
    durations, losses = [], []
    for number, ids in enumerate(token_ids(steps, model.hf_config.vocab_size)):
        begun = time.perf_counter()
        optimizer.zero_grad()
        model.set_step_seed(1, number, 0)
        loss = model.loss(ids, ids, None, MICRO_BATCH * (LENGTH - 1))
        loss.backward()
        optimizer.add_loss(loss)
        optimizer.all_reduce()
        optimizer.step(number, steps)
        durations.append(time.perf_counter() - begun)
        losses.append(loss.item())
    return durations, losses


def trl_arguments(folder: Path, steps: int) -> Any:
    """What SFTTrainer is told: the same steps as ours, on the CPU."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder / "reference"),
        per_device_train_batch_size=MICRO_BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        max_length=LENGTH,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )


def run_trl(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    from datasets import Dataset
    from gpu_shapes import words_tokenizer
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)
    ids = token_ids(steps, model.config.vocab_size).view(-1, LENGTH).tolist()
    durations: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            durations.append(time.perf_counter() - self.begun)

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=trl_arguments(folder, steps),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=words_tokenizer(),
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    return durations, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    peak = Peak()
    peak.start()
    steady, losses = {"ours": run_ours, "trl": run_trl}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
    median = sorted(steady[WARM:])[len(steady[WARM:]) // 2]
    tokens = MICRO_BATCH * LENGTH / median
    print(
        json.dumps(
            {"tokens_per_second": tokens, "peak_bytes": peak.bytes, "first_loss": losses[0], "steps": len(steady)}
        )
    )
