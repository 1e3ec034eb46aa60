"""A small tokenizer, with and without a chat template that marks what the assistant says."""

from collections.abc import Callable
from typing import Any

import pytest

TEMPLATES: dict[str | None, str | None] = {None: None}
TEMPLATES["plain"] = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES["marked"] = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES["rewriting"] = (
    "{{ messages | length }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """name of a chat template -> byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None = "plain") -> Any:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            ["the quick fox"] * 9,
            trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
        fast.chat_template = TEMPLATES[template]
        return fast

    return make
