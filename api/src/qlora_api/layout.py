"""Every key that a run writes into its bucket. Nothing that is read back depends on the world size.

PREFIX/NAME-UID8/checkpoints/step-00000120-gen-00007/...   one complete save: shard-00001-of-00002.safetensors and so
                                                           on by rank; manifest.json, which names them, is written last
PREFIX/NAME-UID8/adapter/gen-00007/...                     what peft loads
PREFIX/NAME-UID8/merged/gen-00007/...                      bf16 safetensors, when asked for
PREFIX/NAME-UID8/manifest.json                             written last, conditionally: it makes the adapter real
PREFIX/NAME-UID8/sources/model.json                        the commit of a hub's repository that all pods read; by the
                                                           first, conditionally (dataset.json, eval.json alike)

Whatever is written before its manifest carries its generation: who was left behind by a newer one and goes on writing
spoils nothing of it.
"""

import re
from dataclasses import dataclass

from qlora_api.run import RunIdentity

MANIFEST = "manifest.json"
CHECKPOINTS, ADAPTERS, MERGED, SOURCES = "checkpoints", "adapter", "merged", "sources"
_CHECKPOINT = re.compile(r"step-(\d{8})-gen-(\d{5})")


@dataclass(frozen=True)
class RunLayout:
    """URIs of one run."""

    root: str

    @classmethod
    def of(cls, output_uri: str, run: RunIdentity) -> "RunLayout":
        """The layout below the spec's output.uri; the uid keeps a re-created run of the same name apart."""
        return cls(f"{output_uri.rstrip('/')}/{run.name}-{run.uid[:8]}")

    def uri(self, key: str) -> str:
        """Of a key below the run's root."""
        return f"{self.root}/{key}"

    def key(self, uri: str) -> str:
        """The key below the run's root that a URI of it names."""
        return uri.removeprefix(self.uri(""))


def checkpoint_key(step: int, generation: int) -> str:
    """Folder of the checkpoint of `step` as saved by `generation`."""
    return f"{CHECKPOINTS}/step-{step:08d}-gen-{generation:05d}"


def adapter_key(generation: int) -> str:
    """Folder of the adapter as uploaded by `generation`."""
    return f"{ADAPTERS}/gen-{generation:05d}"


def merged_key(generation: int) -> str:
    """Folder of the merged model as uploaded by `generation`."""
    return f"{MERGED}/gen-{generation:05d}"


def source_key(name: str) -> str:
    """What the run reads as its `name`: model, dataset or eval."""
    return f"{SOURCES}/{name}.json"


def parse_checkpoint(key: str) -> tuple[int, int] | None:
    """(step, generation) of a checkpoint's folder name inside `key`, or None."""
    match = _CHECKPOINT.search(key)
    return (int(match[1]), int(match[2])) if match else None
