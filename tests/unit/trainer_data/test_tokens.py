"""From rows to tokens: formats, what is trained on, and errors that name file and line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.types import DatasetSpec
from qlora_trainer.errors import BadConfig, BadData, BadModel
from qlora_trainer.rows import Row, read_rows
from qlora_trainer.tokens import build_encoder

CHAT = [
    {"role": "user", "content": "the fox"},
    {"role": "assistant", "content": "quick"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "the quick fox"},
]


def spec(**fields: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"uri": "file:///data", **fields})


def encode(tokenizer: Any, row: dict[str, Any], **fields: Any) -> tuple[str, str]:
    """(whole text, text that is trained on) of one row."""
    row_ = Row("data.jsonl:1", row)
    [(ids, mask)] = build_encoder(spec(**fields), tokenizer, row_)([row_])
    assert len(ids) == len(mask)
    return tokenizer.decode(ids), tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def test_text_ends_with_eos(make_tokenizer: Callable[..., Any]) -> None:
    assert encode(make_tokenizer(), {"text": "the fox"}) == ("the fox<eos>", "the fox<eos>")
    assert encode(make_tokenizer(), {"body": "the fox<eos>"}, textField="body")[0] == "the fox<eos>"


def test_completion_alone_is_trained_on(make_tokenizer: Callable[..., Any]) -> None:
    row = {"prompt": "the fox", "completion": " is quick"}
    assert encode(make_tokenizer(), row) == ("the fox is quick<eos>", " is quick<eos>")
    assert encode(make_tokenizer(), row, trainOn="all")[1] == "the fox is quick<eos>"


def test_conversational_pair(make_tokenizer: Callable[..., Any]) -> None:
    row = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    assert encode(make_tokenizer(), row)[1] == "quick<eos>"


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_assistant_turns_by_mask_or_by_comparison(make_tokenizer: Callable[..., Any], template: str) -> None:
    tokenizer = make_tokenizer(template)
    whole, trained = encode(tokenizer, {"messages": CHAT}, trainOn="assistant")
    assert whole == "<|user|>the fox<eos><|assistant|>quick<eos><|user|>why<eos><|assistant|>the quick fox<eos>"
    assert trained == "quick<eos>the quick fox<eos>"
    assert encode(tokenizer, {"messages": CHAT})[1] == whole


def test_from_value_conversations_are_messages(make_tokenizer: Callable[..., Any]) -> None:
    row = {"conversations": [{"from": "user", "value": "why"}, {"from": "assistant", "value": "fox"}]}
    assert encode(make_tokenizer(), row)[0] == "<|user|>why<eos><|assistant|>fox<eos>"


@pytest.mark.parametrize("answers", ["gpt", "bot", "assistant"])
def test_sharegpts_speakers_are_user_and_assistant(make_tokenizer: Callable[..., Any], answers: str) -> None:
    turns = [("system", "be quick"), ("human", "why"), (answers, "fox")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    whole, trained = encode(make_tokenizer(), row, trainOn="assistant")
    assert whole == "<|system|>be quick<eos><|user|>why<eos><|assistant|>fox<eos>" and trained == "fox<eos>"


@pytest.mark.parametrize("train_on", ["auto", "assistant"])
def test_unknown_roles_are_named(make_tokenizer: Callable[..., Any], train_on: str) -> None:
    turns = [{"role": "human", "content": "why"}, {"role": "bot", "content": "fox"}]
    says = "data.jsonl:1: unknown roles human, bot: write user and assistant"
    with pytest.raises(BadData, match=says):
        encode(make_tokenizer(), {"messages": turns}, trainOn=train_on)
    with pytest.raises(BadData, match=says):
        encode(make_tokenizer(), {"prompt": turns[:1], "completion": turns[1:]})


def test_a_template_may_name_roles_of_its_own(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template += "{% if messages[-1]['role'] == 'bot' %}{% endif %}"
    row = {"messages": [{"role": "user", "content": "why"}, {"role": "bot", "content": "fox"}]}
    assert encode(tokenizer, row)[0] == "<|user|>why<eos><|bot|>fox<eos>"


def test_template_that_rewrites_the_past_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(BadData, match=r"data.jsonl:1.*trainOn: all"):
        encode(make_tokenizer("rewriting"), {"messages": CHAT}, trainOn="assistant")


def test_model_without_chat_template(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(BadModel, match="no chat template: use an instruction-tuned model"):
        encode(make_tokenizer(None), {"messages": CHAT})


@pytest.mark.parametrize(
    ("row", "fields", "error", "says"),
    [
        ({"question": "x"}, {}, BadData, r"data.jsonl:1: columns \['question'\].*`messages`"),
        ({"text": 5}, {}, BadData, "data.jsonl:1: `text` is a int: it must be text"),
        ({"text": ""}, {}, BadData, "`text` is empty"),
        ({"prompt": "a"}, {"format": "prompt-completion"}, BadData, "`completion` is missing"),
        ({"messages": [{"content": "x"}]}, {}, BadData, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, {}, BadData, "message 1 has neither content nor tool_calls"),
        ({"text": "x"}, {"trainOn": "assistant"}, BadConfig, "set trainOn: all"),
        ({"messages": CHAT}, {"trainOn": "completion"}, BadConfig, "set trainOn: assistant"),
        ({"prompt": "a", "completion": CHAT}, {}, BadData, "both be text or both be messages"),
    ],
)
def test_malformed_rows(
    make_tokenizer: Callable[..., Any], row: dict[str, Any], fields: dict[str, Any], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        encode(make_tokenizer(), row, **fields)


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "n": str(i)} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("text,n\n" + "".join(f'"{row["text"]}",{row["n"]}\n' for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert [row.values for row in read_rows(tmp_path, [name])] == rows, name
    assert [row.where for row in read_rows(tmp_path, ["a.jsonl", "c.csv"])][2:4] == ["a.jsonl:3", "c.csv:2"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "x', r"a.jsonl:1: not JSON \(\w+ string starting at column 10\): write one object a"),
        ("a.jsonl", b'{"text": "x\ty"}\n', r"a.jsonl:1: not JSON \(Invalid control character at column 12\)"),
        ("a.jsonl", b'{"messages": [{"role": "user"}\n{"text": "y"}\n', r"a.jsonl:1: not JSON \(.* at column 31\)"),
        ("b.json", b'[{"text": "x}]', r"b.json:1: not JSON \(\w+ string starting at column 11\)"),
        ("a.jsonl", b'{"text": "x"}\n["y"]\n', "a.jsonl:2: a list instead of an object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("b.json", b'[{"text": "x"},\n{"text": }]', "b.json:2: not JSON"),
        ("b.json", b'[{"text": "x"}, 5]', "b.json row 2: a int"),
        ("c.csv", b"text,n\nx\n", "c.csv:2: not as many cells"),
        ("d.parquet", b"not parquet", "d.parquet: not Parquet"),
        ("e.xml", b"", "unknown kind of file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=says):
        list(read_rows(tmp_path, [name]))
