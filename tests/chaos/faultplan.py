"""The files of scripted faults (qlora_trainer.faults): one that all workers read, or one in every pod."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

FILE_NAME = "faults"


class FaultPlan:
    """`files()` says where the plans of the workers of this moment are; they need not exist yet."""

    def __init__(self, files: Callable[[], list[Path]]) -> None:
        self._files, self._number = files, 0

    def hold(self, where: dict[str, object], pods: Sequence[str] = ()) -> str:
        """Whoever reaches this point (of these pods, if any are named) stands still there; the fault's name."""
        self._number += 1
        fault = f"{self._number}"
        lines = [{"id": fault, "action": "hold", **where, **({"pod": pod} if pod else {})} for pod in pods or [""]]
        for file in self._files():
            with file.open("a") as plan:
                plan.writelines(json.dumps(line) + "\n" for line in lines)
        return fault

    def num_held(self, fault: str) -> int:
        """How many have reached it."""
        return sum(len(list(file.parent.glob(f"{file.name}.{fault}.*"))) for file in self._files())

    def release(self, fault: str) -> None:
        """Let them go on."""
        for file in self._files():
            try:
                file.with_name(f"{file.name}.{fault}.release").touch()
            except OSError:
                continue  # this pod is gone
