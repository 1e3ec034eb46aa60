"""Entry point of the group `torchrun.handlers`: `torchrun --rdzv-backend qlora` finds our rendezvous.

No torch here: torch loads this module in the middle of importing its own rendezvous package.
"""

from collections.abc import Callable
from typing import Any


def plugin() -> Callable[[Any], Any]:
    """The creator of handlers, for torch elastic's registry."""
    return _create


def _create(params: Any) -> Any:
    from qlora_trainer.rendezvous import create_handler

    return create_handler(params)
