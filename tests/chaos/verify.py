"""What a run left behind, compared with a run that nobody disturbed: samples, order, adapter, checkpoints."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from qlora_api.layout import MANIFEST
from qlora_trainer import checkpoint
from qlora_trainer.errors import StorageError
from qlora_trainer.storage import FileStore

Steps = dict[int, dict[int, list[int]]]  # step -> micro batch -> samples
TOLERANCE = 2e-3  # relative to the largest change that training made: float32 sums in another order, over the whole run


@dataclass(frozen=True)
class Comparison:
    """Differences of one run from its reference."""

    wrong_samples: int  # steps whose samples or their order differ
    half_written: int  # manifests whose files are missing or damaged
    adapter_distance: float  # largest difference of a weight, relative to the largest weight
    bit_equal: bool


def read_steps(folders: list[Path]) -> Steps:
    """What the newest generation of each step consumed, over all ranks."""
    files = (path for folder in folders for path in folder.glob("trace-*.jsonl"))
    return read_lines(text for path in files for text in path.read_text().splitlines())


def read_lines(texts: Iterable[str]) -> Steps:
    """The same from the traces' lines."""
    newest: dict[int, int] = {}
    lines = defaultdict(dict)
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the writer was killed in the middle of its last line
        step, generation = line["step"], line["generation"]
        lines[(step, generation)].setdefault(line["micro"], line["samples"])
        newest[step] = max(newest.get(step, 0), generation)
    return {step: dict(sorted(lines[(step, generation)].items())) for step, generation in sorted(newest.items())}


def compare(steps: Steps, bucket: Path, reference_steps: Steps, reference_bucket: Path) -> Comparison:
    """The run in `bucket` against the reference."""
    wrong = [step for step in steps.keys() | reference_steps.keys() if steps.get(step) != reference_steps.get(step)]
    for step in sorted(wrong)[:5]:
        print(f"step {step}: consumed {steps.get(step)}, not {reference_steps.get(step)}", flush=True)
    mine, reference = _adapter(bucket), _adapter(reference_bucket)
    assert mine.keys() == reference.keys() and mine, "the adapters have different tensors"
    scale = max(float(tensor.abs().max()) for tensor in reference.values())
    distance = max(float((mine[name] - reference[name]).abs().max()) for name in mine) / scale
    equal = all(torch.equal(mine[name], reference[name]) for name in mine)
    return Comparison(len(wrong), num_half_written(bucket), distance, equal)


def num_half_written(bucket: Path) -> int:
    """Complete checkpoints by their manifest that can't be loaded byte for byte."""
    damaged = 0
    for root in (path.parents[2] for path in bucket.rglob(f"checkpoints/*/{MANIFEST}")):
        store = FileStore(root)
        for manifest in checkpoint.find_complete(store):
            try:
                checkpoint.load(store, manifest)
            except (StorageError, FileNotFoundError):
                damaged += 1
    return damaged


def _adapter(bucket: Path) -> dict[str, torch.Tensor]:
    (path,) = bucket.rglob("adapter_model.safetensors")
    return load_file(path)
