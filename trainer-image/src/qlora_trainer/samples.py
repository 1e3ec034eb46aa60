"""Tokenized samples on disk: built once per node, memory-mapped by every worker.

A folder holds `ids` (int32) and `mask` (uint8, 1 = trained on) of all samples one after the other, `offsets` (int64,
one more than samples), `targets` (int64, tokens of each sample in the loss) and meta.json, written last. Samples longer
than maxLength are cut; samples without a token to train on are left out and counted.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from qlora_api.run import TrainConfig
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadConfig, BadData
from qlora_trainer.rows import Row, read_rows
from qlora_trainer.skeleton import read_hf_config
from qlora_trainer.sources import Source
from qlora_trainer.tokens import Encoder, Tokens, build_encoder

FORMAT = 3  # raise it when the tokens of the same rows change
_BATCH = 256  # rows


@dataclass(frozen=True)
class SampleMeta:
    """What became of the rows."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_tokens_cut: int  # beyond maxLength
    num_samples_masked: int  # left out: nothing to train on


@dataclass(frozen=True)
class SampleSet:
    """Tokenized samples. `ids` and `mask` are flat; sample i is [offsets[i], offsets[i + 1])."""

    ids: "np.ndarray[Any, np.dtype[np.int32]]"
    mask: "np.ndarray[Any, np.dtype[np.uint8]]"
    offsets: "np.ndarray[Any, np.dtype[np.int64]]"
    targets: "np.ndarray[Any, np.dtype[np.int64]]"  # masked in and not the first: nothing predicts that one
    meta: SampleMeta

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Tokens of each sample."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def of_lists(cls, samples: list[tuple[list[int], list[int]]]) -> "SampleSet":
        """From token and mask lists, in memory."""
        flat = [np.array([value for sample in samples for value in sample[part]]) for part in (0, 1)]
        offsets = np.cumsum([0] + [len(ids) for ids, _ in samples], dtype=np.int64)
        meta = SampleMeta(len(samples), len(samples), int(offsets[-1]), 0, 0)
        targets = np.array([sum(mask[1:]) for _, mask in samples], dtype=np.int64)
        return cls(flat[0].astype(np.int32), flat[1].astype(np.uint8), offsets, targets, meta)


def ensure_samples(
    config: TrainConfig, source: Source, model: Source, tokenizer: Any, env: WorkerEnv, what: str = "dataset"
) -> SampleSet:
    """The tokenized samples of a source, from the node's cache where it holds them. Raises BadConfig, BadData."""
    dataset, length = config.spec.dataset, config.spec.training.max_length
    require_context(length, read_hf_config(model.path, config.spec.model.trust_remote_code))
    identity = [FORMAT, source.digest, model.digest, dataset.format, dataset.text_field, dataset.train_on, length]
    folder = env.cache_dir / "samples" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "meta.json").is_file():
            rows = read_rows(source.path, source.files)
            _write(folder, rows, lambda first: build_encoder(dataset, tokenizer, first), length, what)
    return _open(folder)


def require_context(max_length: int, hf_config: Any) -> None:
    """Raises BadConfig when sequences may get longer than the model has positions for; some models have no such limit.

    A factor in `rope_parameters` (yarn, linear, ...) lengthens the context that the model was pretrained for; some
    models count it into max_position_embeddings already, so the longer one of the two is allowed. Where the layers
    have factors of their own (Gemma 3), max_position_embeddings is the lengthened one.
    """
    text = hf_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 0
    rope = getattr(text, "rope_parameters", None) or {}
    pretrained = rope.get("original_max_position_embeddings") or positions
    limit = max(positions, int(pretrained * (rope.get("factor") or 1)))
    if 0 < limit < max_length:
        raise BadConfig(
            f"training.maxLength {max_length} is more than the model's {limit} positions (max_position_embeddings in"
            f" its config.json): set training.maxLength to {limit} or less"
        )


def _open(folder: Path) -> SampleSet:
    meta = SampleMeta(**json.loads((folder / "meta.json").read_text()))
    ids = np.memmap(folder / "ids", dtype=np.int32, mode="r")
    mask = np.memmap(folder / "mask", dtype=np.uint8, mode="r")
    offsets, targets = (np.fromfile(folder / name, dtype=np.int64) for name in ("offsets", "targets"))
    return SampleSet(ids, mask, offsets, targets, meta)


def _write(
    folder: Path, rows: Iterable[Row], encoder_for: Callable[[Row], Encoder], max_length: int, what: str
) -> None:
    """Encode all rows into a temporary folder, then rename it."""
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    offsets, targets, num_rows, cut, masked, beyond = [0], list[int](), 0, 0, 0, 0
    with (temporary / "ids").open("wb") as ids_file, (temporary / "mask").open("wb") as mask_file:
        for ids, mask in _encoded(rows, encoder_for):
            num_rows += 1
            if not any(mask[1:max_length]):
                masked += 1
                beyond += any(mask[max_length:])
                continue
            cut += max(0, len(ids) - max_length)
            np.array(ids[:max_length], dtype=np.int32).tofile(ids_file)
            np.array(mask[:max_length], dtype=np.uint8).tofile(mask_file)
            offsets.append(offsets[-1] + min(len(ids), max_length))
            targets.append(sum(mask[1:max_length]))
    _require_samples(num_rows, len(offsets) - 1, beyond, what)
    for name, values in (("offsets", offsets), ("targets", targets)):
        np.array(values, dtype=np.int64).tofile(temporary / name)
    meta = SampleMeta(num_rows, len(offsets) - 1, offsets[-1], cut, masked)
    (temporary / "meta.json").write_text(json.dumps(asdict(meta)))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _encoded(rows: Iterable[Row], encoder_for: Callable[[Row], Encoder]) -> Iterator[Tokens]:
    encode: Encoder | None = None
    rows = iter(rows)
    while batch := list(islice(rows, _BATCH)):
        encode = encode or encoder_for(batch[0])
        yield from encode(batch)


def _require_samples(num_rows: int, num_samples: int, num_beyond: int, what: str) -> None:
    """`num_beyond`: samples left out though there is something to train on, beyond maxLength."""
    if num_rows == 0:
        raise BadData(f"the {what} is empty: its files hold no row")
    if num_samples == 0 and num_beyond:
        raise BadData(
            f"none of the {num_rows} rows of the {what} has a token to train on within training.maxLength:"
            " raise maxLength or set dataset.trainOn: all"
        )
    if num_samples == 0:
        raise BadData(
            f"none of the {num_rows} rows of the {what} has a token to train on: with dataset.trainOn: assistant a row"
            " needs a turn of role assistant; write one or set dataset.trainOn: all"
        )
