"""The token cache on disk: cut, masked, mapped, built once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig, PreTrainedConfig

from qlora_api.run import RunIdentity, TrainConfig
from qlora_api.types import QLoRAFinetuneSpec
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadConfig, BadData
from qlora_trainer.samples import SampleSet, ensure_samples, require_context
from qlora_trainer.sources import Source

QUESTION = {"messages": [{"role": "user", "content": "why"}]}


def build(
    tmp_path: Path,
    tokenizer: Any,
    rows: list[Any],
    digest: str = "data",
    dataset: dict[str, str] | None = None,
    **training: Any,
) -> SampleSet:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=tmp_path, files=["a.jsonl"], digest=digest)
    data = {"uri": "file:///d", **(dataset or {})}
    spec = {"model": {"uri": "file:///m"}, "dataset": data, "output": {"uri": "s3://bucket/x"}}
    parsed = QLoRAFinetuneSpec.model_validate({**spec, "training": training})
    config = TrainConfig(run=RunIdentity(namespace="n", name="r", uid="u"), spec=parsed)
    env = WorkerEnv(0, 0, 1, 1, tmp_path, tmp_path / "cache", tmp_path, "cpu")
    LlamaConfig(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    model = Source(path=tmp_path / "model", files=[], digest="model")
    return ensure_samples(config, source, model, tokenizer, env)


def test_samples_are_cut_and_counted(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    rows = [{"prompt": "the fox", "completion": "x" * n} for n in (1, 5, 300)] + [
        {"prompt": "y" * 99, "completion": "z"}
    ]
    samples = build(tmp_path, make_tokenizer(), rows, maxLength=16)
    meta = samples.meta
    assert (meta.num_rows, meta.num_samples, meta.num_samples_masked) == (4, 3, 1), (
        "no completion left within 16 tokens"
    )
    assert samples.lengths.max() == 16 and meta.num_tokens == samples.offsets[-1] and meta.num_tokens_cut > 200
    for i in range(3):
        part = slice(samples.offsets[i], samples.offsets[i + 1])
        assert samples.targets[i] == samples.mask[part][1:].sum() > 0


def test_the_cache_is_found_again_by_its_content(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    first = build(tmp_path, tokenizer, [{"text": "the fox"}])
    again = build(tmp_path, None, [], digest="data")  # neither tokenizer nor rows are needed
    assert again.ids.tolist() == first.ids.tolist() and again.meta == first.meta
    assert len(build(tmp_path, tokenizer, [{"text": "a"}, {"text": "b"}], digest="other")) == 2


def test_many_rows_keep_their_order(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    samples = build(tmp_path, tokenizer, [{"text": f"row {i}"} for i in range(600)])
    texts = [tokenizer.decode(samples.ids[samples.offsets[i] : samples.offsets[i + 1]]) for i in (0, 255, 256, 599)]
    assert texts == [f"row {i}<eos>" for i in (0, 255, 256, 599)]


@pytest.mark.parametrize(
    ("rows", "dataset", "says"),
    [
        ([], {}, "the dataset is empty"),
        ([{"prompt": "x" * 99, "completion": "y"}], {}, "raise maxLength"),
        ([QUESTION], {"trainOn": "assistant"}, "token to train on: .* needs a turn of role assistant"),
    ],
)
def test_nothing_to_train_on(
    tmp_path: Path, make_tokenizer: Callable[..., Any], rows: list[Any], dataset: dict[str, str], says: str
) -> None:
    with pytest.raises(BadData, match=says):
        build(tmp_path, make_tokenizer(), rows, dataset=dataset, maxLength=16)


def test_no_sequence_is_longer_than_the_model_has_positions(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(BadConfig, match=r"maxLength 4097 is more than the model's 4096 positions .* 4096 or less"):
        build(tmp_path, make_tokenizer(), [{"text": "the fox"}], maxLength=4097)
    assert len(build(tmp_path, make_tokenizer(), [{"text": "the fox"}], maxLength=4096)) == 1


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("hf_config", "limit"),
    [
        (GPT2Config(n_positions=1024), 1024),
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 4.0}), 16384),
        (LlamaConfig(max_position_embeddings=32768, rope_parameters=dict(YARN)), 131072),
        (
            LlamaConfig(
                max_position_embeddings=131072, rope_parameters={**YARN, "original_max_position_embeddings": 32768}
            ),
            131072,
        ),
        (
            LlamaConfig(
                max_position_embeddings=131072, rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}
            ),
            131072,
        ),
        (Gemma3Config(text_config={"max_position_embeddings": 8192}), 8192),
        (BloomConfig(), None),
    ],
    ids=["learned", "rope", "linear", "yarn", "yarn-counted-in", "llama3", "multimodal", "alibi"],
)
def test_the_limit_is_the_models_own_after_its_rope_scaling(hf_config: PreTrainedConfig, limit: int | None) -> None:
    if limit is None:
        require_context(1_048_576, hf_config)
        return
    require_context(limit, hf_config)
    with pytest.raises(BadConfig, match=f"the model's {limit} positions"):
        require_context(limit + 1, hf_config)
