"""Tensors of safetensors files by name: mapped into host memory, or read onto a GPU through the staging threads."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_trainer.errors import BadModel
from qlora_trainer.staging import ReadJob, Stager, write_tensor

# the format's names: https://huggingface.co/docs/safetensors/index#format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: bytes [offset, offset + length) of a file."""

    path: Path
    offset: int
    length: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of a safetensors file by name. Raises BadModel when one is of a type that is not supported."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise BadModel(f"{path}: {name} is of type {entry['dtype']}: convert the weights to bfloat16")
        begin, end = entry["data_offsets"]
        places[name] = Place(path, 8 + size + begin, end - begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


def read_tensors(places: dict[str, Place], stager: Stager) -> dict[str, Tensor]:
    """The tensors on the stager's device. Raises BadModel, OSError."""
    tensors = {name: torch.empty(at.shape, dtype=at.dtype, device=stager.device) for name, at in places.items()}
    stager.read(
        ReadJob(at.path, at.offset, at.length, tensors[name].view(-1).view(torch.uint8)) for name, at in places.items()
    )
    return tensors


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, Tensor, torch.dtype]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write (name, contiguous tensor on any device, type in the file) one piece at a time.

    Never a copy of a tensor, and other threads run on: the library's own `save` holds the interpreter until it is done.
    """
    ordered = sorted(tensors, key=lambda item: -item[2].itemsize)  # each aligned to its own type's size
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor, dtype in ordered:
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor, dtype in ordered:
            write_tensor(file, tensor, dtype)


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model folder: those that its index names, else all. Raises BadModel."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any("/" in name for name in names):  # no source brings these, and no digest covers them
            raise BadModel(f"{index} names weights in other folders: put all of them beside it")
        return [model_dir / name for name in names]
    files = sorted(path for path in model_dir.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise BadModel(f"{model_dir} has no *.safetensors: convert the weights (pickled *.bin are never read)")
    return files


class Weights:
    """The tensors of a safetensors folder by parameter name; a checkpoint's names may have the base model's prefix."""

    def __init__(self, model_dir: Path) -> None:
        self._mapped: dict[str, safe_open] = {}
        self._places: dict[str, Place] = {}
        for path in weight_files(model_dir):
            handle = safe_open(path, "pt", device="cpu")
            self._mapped.update(dict.fromkeys(handle.keys(), handle))
            self._places.update(read_header(path))

    def get(self, name: str, stager: Stager | None = None) -> Tensor:
        """One tensor: on the stager's device, or mapped from the file (copied by nobody, not to be changed)."""
        alias = self._alias(name)
        if alias is None:
            raise BadModel(f"the model's weight files lack {name}: its config.json and weights do not belong together")
        if stager is not None:
            return read_tensors({alias: self._places[alias]}, stager)[alias]
        tensor: Tensor = self._mapped[alias].get_tensor(alias)
        return tensor

    def __contains__(self, name: str) -> bool:
        return self._alias(name) is not None

    def _alias(self, name: str) -> str | None:
        """The name in the files, which may have been saved with or without the base model's prefix."""
        aliases = (name, name.partition(".")[2], f"model.{name}", f"language_model.{name}")
        return next((alias for alias in aliases if alias in self._places), None)
