"""From rows to token ids with a mask of the tokens that are trained on.

Formats and token sequences are TRL's (`SFTTrainer._prepare_dataset`): an end-of-sequence token after text and
completions, the chat template for messages, the completion from where prompt and whole diverge. The assistant's turns
come from the template's generation mask (its own or the one that TRL knows for it); templates without one are rendered
turn by turn and compared.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_api.run import TrainConfig
from qlora_api.types import DatasetSpec
from qlora_trainer.errors import BadConfig, BadData, BadModel
from qlora_trainer.rows import Row

Tokens = tuple[list[int], list[int]]  # ids and, for each, 1 where it is trained on
Encoder = Callable[[list[Row]], list[Tokens]]  # plain text goes through the tokenizer in batches, on all cores
_ROLES = {"user", "assistant", "system", "tool", "developer"}  # what chat templates are written for
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # names of a turn's speaker under `from`
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(config: TrainConfig, folder: Path) -> Any:
    """The base model's tokenizer. Raises BadModel when there is none."""
    from transformers import AutoTokenizer

    uri = config.spec.model.uri
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadModel(f"{uri} has no tokenizer: put tokenizer.json and tokenizer_config.json beside the weights")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.spec.model.trust_remote_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise BadModel(
            f"{uri}: the tokenizer cannot be loaded ({error}): save it again with save_pretrained"
        ) from error


def pad_id(tokenizer: Any) -> int:
    """Id that fills sequences up; never trained on, never attended to by a sample."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def build_encoder(dataset: DatasetSpec, tokenizer: Any, first: Row) -> Encoder:
    """How this data set's rows become tokens; `first` decides where the format is `auto`."""
    kind = dataset.format if dataset.format != "auto" else _kind_of(first, dataset.text_field)
    train_on = dataset.train_on
    if train_on == "auto":
        train_on = "completion" if kind == "prompt-completion" else "all"
    if kind == "text":
        if train_on != "all":
            raise BadConfig(f"trainOn: {train_on} needs turns: format text has none; set trainOn: all")
        return lambda rows: _encode_texts(rows, dataset.text_field, tokenizer)
    if kind == "prompt-completion":
        return lambda rows: [_encode_pair(row, tokenizer, train_on) for row in rows]
    if train_on == "completion":
        raise BadConfig("trainOn: completion needs format prompt-completion; with messages set trainOn: assistant")
    _require_template(tokenizer)
    template = _assistant_template(tokenizer) if train_on == "assistant" else None
    return lambda rows: [_encode_messages(row, tokenizer, train_on, template) for row in rows]


def _kind_of(row: Row, text_field: str) -> str:
    keys = row.values.keys()
    if keys & {"messages", "conversations"}:
        return "messages"
    if {"prompt", "completion"} <= keys:
        return "prompt-completion"
    if text_field in keys:
        return "text"
    raise BadData(
        f"{row.where}: columns {sorted(keys)} are none of the known formats: need `messages`, `prompt` and"
        f" `completion`, or `{text_field}` (dataset.textField)"
    )


def _require_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise BadModel(
            "the model's tokenizer has no chat template: use an instruction-tuned model, or format text or"
            " prompt-completion"
        )


def _field(row: Row, name: str, kinds: tuple[type, ...] = (str,)) -> Any:
    value = row.values.get(name)
    if not isinstance(value, kinds) or not value:
        found = "missing" if name not in row.values else "empty" if not value else f"a {type(value).__name__}"
        wanted = " or ".join("text" if kind is str else "a list of messages" for kind in kinds)
        raise BadData(f"{row.where}: `{name}` is {found}: it must be {wanted}")
    return value


def _with_eos(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token or ""
    return text if text.endswith(eos) else text + eos


def _encode_texts(rows: list[Row], field: str, tokenizer: Any) -> list[Tokens]:
    texts = [_with_eos(_field(row, field), tokenizer) for row in rows]
    return [(ids, [1] * len(ids)) for ids in tokenizer(text=texts)["input_ids"]]


def _encode_pair(row: Row, tokenizer: Any, train_on: str) -> Tokens:
    from trl.data_utils import common_prefix_length

    prompt, completion = _field(row, "prompt", (str, list)), _field(row, "completion", (str, list))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise BadData(f"{row.where}: `prompt` and `completion` must both be text or both be messages")
    if isinstance(prompt, list):
        _require_template(tokenizer)
        _require_turns(row, prompt + completion, tokenizer)
        before = _render(row, prompt, tokenizer, add_generation_prompt=True)["input_ids"]
        ids = _render(row, prompt + completion, tokenizer)["input_ids"]
    else:
        before = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=prompt + _with_eos(completion, tokenizer))["input_ids"]
    if train_on == "all":
        return ids, [1] * len(ids)
    start = common_prefix_length(before, ids)
    return ids, [0] * start + [1] * (len(ids) - start)


def _messages(row: Row, tokenizer: Any) -> list[dict[str, Any]]:
    """The row's turns as role and content: TRL's conversion, after ShareGPT's speakers were given their roles."""
    from trl.data_utils import maybe_convert_to_chatml

    values = {key: row.values[key] for key in ("messages", "conversations") if key in row.values}
    for turns in values.values():
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, dict) and isinstance(turn.get("from"), str):
                turn["from"] = _SHAREGPT.get(turn["from"], turn["from"])
    messages: list[dict[str, Any]] = _field(Row(row.where, maybe_convert_to_chatml(values)), "messages", (list,))
    _require_turns(row, messages, tokenizer)
    return messages


def _require_turns(row: Row, messages: list[Any], tokenizer: Any) -> None:
    """Raises BadData unless all are messages, spoken in roles that the template can know.

    Most templates render any role without a word; a conversation without an assistant, in roles that the template does
    not name either, would be trained on in the wrong words or not at all.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadData(f'{row.where}: message {number} has no role: write {{"role": ..., "content": ...}}')
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise BadData(f"{row.where}: message {number} has neither content nor tool_calls")
    roles = list(dict.fromkeys(message["role"] for message in messages))
    if "assistant" in roles:
        return
    named = set(re.findall(r"['\"](\w+)['\"]", str(tokenizer.chat_template)))
    if unknown := [role for role in roles if role not in _ROLES | named]:
        raise BadData(
            f"{row.where}: unknown roles {', '.join(unknown)}: write user and assistant (system, tool where needed)"
        )


def _render(row: Row, messages: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    from jinja2.exceptions import TemplateError

    tools = row.values.get("tools")
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=(json.loads(tools) if isinstance(tools, str) else tools) or None,
            tokenize=True,
            return_dict=True,
            **(row.values.get("chat_template_kwargs") or {}),
            **options,
        )
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise BadData(f"{row.where}: the chat template refuses these messages: {error}") from error


def _assistant_template(tokenizer: Any) -> str | None:
    """A template with generation marks: the tokenizer's own or TRL's for it; None when there is none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return str(tokenizer.get_chat_template())
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        return None
    return template


def _encode_messages(row: Row, tokenizer: Any, train_on: str, template: str | None) -> Tokens:
    messages = _messages(row, tokenizer)
    if train_on == "all":
        ids = _render(row, messages, tokenizer)["input_ids"]
        return ids, [1] * len(ids)
    if template is None:
        return _by_turns(row, messages, tokenizer)
    rendered = _render(row, messages, tokenizer, chat_template=template, return_assistant_tokens_mask=True)
    return rendered["input_ids"], rendered["assistant_masks"]


def _by_turns(row: Row, messages: list[dict[str, Any]], tokenizer: Any) -> Tokens:
    """Mark what each assistant turn adds to the conversation rendered up to it."""
    ids = _render(row, messages, tokenizer)["input_ids"]
    mask = [0] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(row, messages[:turn], tokenizer, add_generation_prompt=True)["input_ids"] if turn else []
        after = _render(row, messages[: turn + 1], tokenizer)["input_ids"]
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise BadData(
                f"{row.where}: the chat template renders a conversation differently as it grows, so the assistant's"
                " turns cannot be told apart: set dataset.trainOn: all or use a template with generation marks"
            )
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return ids, mask
