"""Every key that a run writes into its bucket. Nothing in a key or an object knows the world size.

PREFIX/NAME-UID8/checkpoints/step-00000120-gen-00007/...   one complete save; manifest.json is written last
PREFIX/NAME-UID8/adapter/...                               what peft loads
PREFIX/NAME-UID8/merged/...                                bf16 safetensors, when asked for
PREFIX/NAME-UID8/manifest.json                             written last, conditionally: it makes the adapter real
"""

import re
from dataclasses import dataclass

from qlora_api.run import RunIdentity

MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"step-(\d{8})-gen-(\d{5})")


@dataclass(frozen=True)
class RunLayout:
    """URIs of one run."""

    root: str

    @classmethod
    def of(cls, output_uri: str, run: RunIdentity) -> "RunLayout":
        """The layout below the spec's output.uri; the uid keeps a re-created run of the same name apart."""
        return cls(f"{output_uri.rstrip('/')}/{run.name}-{run.uid[:8]}")

    @property
    def adapter(self) -> str:
        return f"{self.root}/adapter"

    @property
    def merged(self) -> str:
        return f"{self.root}/merged"

    @property
    def manifest(self) -> str:
        return f"{self.root}/{MANIFEST}"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    def checkpoint(self, step: int, generation: int) -> str:
        """Folder of the checkpoint of `step` as saved by `generation`."""
        return f"{self.checkpoints}/step-{step:08d}-gen-{generation:05d}"


def parse_checkpoint(key: str) -> tuple[int, int] | None:
    """(step, generation) of a checkpoint's folder name inside `key`, or None."""
    match = _CHECKPOINT.search(key)
    return (int(match[1]), int(match[2])) if match else None
