"""TRL's SFTTrainer is the oracle: same model, data, order and initial adapter give the same losses and adapter.

TRL runs in one process on bitsandbytes' 4-bit layers; ours runs in worlds of 1 to 4 processes. Float32
throughout; only sums are taken in another order. Tolerances: LOSS_TOLERANCE, relative, for the loss of every step;
ADAPTER_TOLERANCE times the largest change that training made to a tensor for its elements.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer.group import Group
from qlora_trainer.session import Session, set_up
from qlora_trainer.standing import Kept

LOSS_TOLERANCE = 2e-6
ADAPTER_TOLERANCE = 1e-2
NO_EVAL = {"evalFraction": 0.0}


def texts_in_order(session: Session) -> list[dict[str, str]]:
    """The rows that the steps consume, one after the other."""
    rows = [
        json.loads(line)
        for line in Path(session.config.spec.dataset.uri.removeprefix("file://")).read_text().splitlines()
    ]
    plan, sequences = session.data.plan, session.data.sequences
    return [
        rows[sample]
        for step in range(plan.num_steps)
        for sequence in plan.sequences_of(step)
        for sample in sequences.samples_of(sequence)
    ]


def quantized_by_bitsandbytes(spec: QLoRAFinetuneSpec, base: str) -> Any:
    """transformers' model of the base in float32 over 4-bit layers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization.type,
        bnb_4bit_use_double_quant=spec.quantization.double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    for module in model.modules():  # on some CPUs bitsandbytes repacks weights in place after an evaluation
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def trl_arguments(session: Session, folder: Path) -> Any:
    """TRL's configuration for the run's own."""
    from trl import SFTConfig

    training = session.config.spec.training
    return SFTConfig(
        output_dir=str(folder),
        max_steps=session.data.plan.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.global_batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler,
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        max_length=training.max_length,
        train_sampling_strategy="sequential",
        packing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        optim="adamw_torch",
        gradient_checkpointing=False,
    )


def train_with_trl(session: Session, initial: dict[str, Tensor], folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every step and the adapter, from TRL, PEFT and bitsandbytes."""
    from datasets import Dataset
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    spec = session.config.spec
    base = spec.model.uri.removeprefix("file://")
    targets = "all-linear" if spec.lora.target_modules == ["all-linear"] else spec.lora.target_modules
    lora = LoraConfig(
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        target_modules=targets,
        use_rslora=spec.lora.use_rslora,
        use_dora=spec.lora.use_dora,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=quantized_by_bitsandbytes(spec, base),
        args=trl_arguments(session, folder),
        train_dataset=Dataset.from_list(texts_in_order(session)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
    )
    for parameter in trainer.model.parameters():  # TRL keeps the adapter of a quantized model in bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    result = set_peft_model_state_dict(trainer.model, dict(initial))
    assert not result.unexpected_keys
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(trainer.model).items()}


def initial_adapter(session: Session) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in session.model.trainable.items()}


def our_losses(world: Any) -> list[float]:
    metrics = world.adapter_folder() / "metrics.json"
    return [point[1] for point in json.loads(metrics.read_text())["history"]["points"]]


def assert_same(
    ours: tuple[list[float], dict[str, Tensor]],
    theirs: tuple[list[float], dict[str, Tensor]],
    initial: dict[str, Tensor],
) -> None:
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=LOSS_TOLERANCE, atol=0)
    assert ours[1].keys() == theirs[1].keys() == initial.keys()
    for name, tensor in theirs[1].items():
        change, difference = ((tensor - other[name]).abs().max() for other in (initial, ours[1]))
        assert difference <= ADAPTER_TOLERANCE * change, f"{name}: {difference / change}"


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """What TRL reached; computed once for the module."""
    return {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_llama_at_every_world_size(
    make_world: Callable[..., Any], known: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    world = make_world("ours", dataset=NO_EVAL, training={"packing": False})
    if not known:
        session = set_up(world.config, world.env(9), Group(), Kept())
        known["initial"] = initial_adapter(session)
        known["theirs"] = train_with_trl(session, known["initial"], tmp_path / "trl")
    assert world.run(list(range(world_size))) == [0] * world_size
    assert_same((our_losses(world), world.adapter()), known["theirs"], known["initial"])


@pytest.mark.parametrize(
    ("family", "shape", "spec"),
    [
        ("mistral", {"head_dim": 16, "sliding_window": 8}, {}),
        ("qwen2", {}, {"training": {"lrScheduler": "linear", "warmupRatio": 0.3}}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, {"lora": {"useRslora": True}}),
        ("gemma", {"head_dim": 16}, {"lora": {"targetModules": ["q_proj", "v_proj"]}}),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}, {}),
        ("phi3", {}, {"lora": {"r": 8}}),
        ("llama", {}, {"lora": {"useDora": True}}),
        ("llama", {}, {"quantization": {"type": "fp4", "doubleQuant": False}}),
    ],
)
def test_families_and_switches(
    make_world: Callable[..., Any],
    make_model: Callable[..., None],
    tmp_path: Path,
    family: str,
    shape: dict[str, Any],
    spec: dict[str, Any],
) -> None:
    """One process of ours against TRL, each family with another switch."""
    make_model(tmp_path / "model", family, **shape)
    training = {"packing": False, **spec.get("training", {})}
    world = make_world("ours", tmp_path / "model", dataset=NO_EVAL, **{**spec, "training": training})
    session = set_up(world.config, world.env(9), Group(), Kept())
    initial = initial_adapter(session)
    theirs = train_with_trl(session, initial, tmp_path / "trl")
    assert world.run([0]) == [0]
    assert_same((our_losses(world), world.adapter()), theirs, initial)


def test_completions_alone_count(make_world: Callable[..., Any], pairs_file: Path, tmp_path: Path) -> None:
    world = make_world("ours", data=pairs_file, dataset=NO_EVAL, training={"packing": False, "microBatchSize": 3})
    session = set_up(world.config, world.env(9), Group(), Kept())
    initial = initial_adapter(session)
    theirs = train_with_trl(session, initial, tmp_path / "trl")
    assert world.run([0, 1]) == [0, 0]
    assert_same((our_losses(world), world.adapter()), theirs, initial)
