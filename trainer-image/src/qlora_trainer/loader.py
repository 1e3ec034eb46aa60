"""The quantized base on disk: built once per node from safetensors, read by every later start.

`cache_dir/packed/DIGEST/` holds one flat blob of bytes a decoder layer (`layer-00000.bin`), what is not quantized
(`rest.safetensors`: embeddings, norms, biases, head), `config.json` and `index.json`, written last: the folder is
complete when the index is there. Nothing in it knows a world size. `packing` builds it.

Rules: on a CPU files are mapped; onto a GPU they are read by `staging`'s threads, straight to their places.
"""

import json
import mmap
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qlora_api.run import TrainConfig
from qlora_trainer.errors import BadModel, CorruptBase
from qlora_trainer.packing import FORMAT, PackedLayer, build, key_of
from qlora_trainer.quant import FP_TYPES, Scheme, Stored, Tables, fingerprint
from qlora_trainer.skeleton import read_hf_config
from qlora_trainer.sources import Source
from qlora_trainer.staging import ReadJob, Stager, read_into
from qlora_trainer.weights import read_header, read_tensors

__all__ = ["PackedLayer", "PackedModel", "corrupt", "discard_damaged", "ensure_packed", "open_packed"]


@dataclass(frozen=True)
class PackedModel:
    """A complete packed folder. `prefix` is the module path of the decoder layers (`model.layers`)."""

    folder: Path
    digest: str
    prefix: str
    scheme: Scheme
    layers: list[PackedLayer]
    rest: dict[str, tuple[int, int]]  # fingerprints of what is not quantized and of the code books
    hf_config: Any
    trust_remote_code: bool

    def read_layer(self, index: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes [start, stop) of a layer's blob: a uint8 tensor over the mapped file (read-only, not copied)."""
        layer = self.layers[index]
        stop = layer.size if stop is None else min(stop, layer.size)
        if stop <= start:
            return torch.empty(0, dtype=torch.uint8)
        with open(self.folder / layer.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapped, dtype=torch.uint8, count=stop - start, offset=start)

    def load_layers(self, targets: Iterable[tuple[int, int, int, Tensor]], staged: bool | None = None) -> None:
        """For each (index, start, stop, destination): bytes [start, stop) of a layer's blob into the uint8 destination.

        What lies beyond the blob's end becomes zero; the destination may be longer. staged: all at once, by several
        threads (on GPUs); else one after the other (on CPUs, and in a subclass that overrides `read_layer` alone).
        Raises BadModel, OSError.
        """
        jobs = []
        for index, start, stop, destination in targets:
            layer = self.layers[index]
            end = max(start, min(stop, layer.size))
            destination[end - start : stop - start] = 0
            own = destination[: end - start]
            if type(self).read_layer is PackedModel.read_layer and (own.is_cuda if staged is None else staged):
                jobs.append(ReadJob(self.folder / layer.file, start, end - start, own))
            else:
                own.copy_(self.read_layer(index, start, end))
        if jobs:
            read_into(jobs, jobs[0].destination.device)

    def read_rest(self, device: torch.device, on_host: str = "") -> dict[str, Tensor]:
        """What is not quantized, by parameter name; `on_host` stays in host memory, mapped from the file.

        Raises CorruptBase, BadModel, OSError.
        """
        path = self.folder / "rest.safetensors"
        places = {name: place for name, place in read_header(path).items() if not name.startswith("tables.")}
        with safe_open(path, "pt", device="cpu") as file:
            host = {name: file.get_tensor(name) for name in places if name == on_host or device.type == "cpu"}
        with Stager(device) as stager:
            found = read_tensors({name: place for name, place in places.items() if name not in host}, stager)
        return self._intact(host | found)

    def read_tables(self, device: torch.device) -> Tables:
        """The code books of dequantization. Raises CorruptBase, OSError."""
        with safe_open(self.folder / "rest.safetensors", "pt", device=str(device)) as file:
            names = ("tables.code4", "tables.code8")
            return Tables(*self._intact({name: file.get_tensor(name) for name in names}).values())

    def _intact(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, if they are what was written."""
        for name, tensor in tensors.items():
            if (found := fingerprint(tensor)) != self.rest[name]:
                raise corrupt(f"{name}: checksum {found} of it", self.rest[name], _discard_damaged_rest(self, name))
        return tensors


def ensure_packed(config: TrainConfig, model: Source, cache_dir: Path, device: torch.device) -> PackedModel:
    """The packed base of `model` under `cache_dir`, built if need be on `device`. Raises BadModel."""
    spec = config.spec
    quantization = spec.quantization
    scheme = Scheme(quantization.type, quantization.double_quant, FP_TYPES[quantization.storage_dtype])
    folder = cache_dir / "packed" / key_of(model.digest, scheme, device.type)
    while not _is_complete(folder):  # again where a crash of the node tore what an earlier start had built
        folder.mkdir(parents=True, exist_ok=True)
        build(model.path, folder, scheme, device, spec.model.trust_remote_code)
    return open_packed(folder, spec.model.trust_remote_code)


def open_packed(folder: Path, trust_remote_code: bool = False) -> PackedModel:
    """A complete packed folder; raises BadModel when its index is missing or of another format."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise BadModel(f"{folder}: no packed model ({error}): delete the folder, the next start builds it") from error
    if index["format"] != FORMAT:
        raise BadModel(f"{folder}: packed format {index['format']}, this image reads {FORMAT}: delete the folder")
    layers = [_layer_from_json(layer) for layer in index["layers"]]
    scheme = Scheme(index["scheme"]["type"], index["scheme"]["double"], FP_TYPES[index["scheme"]["dtype"]])
    hf_config = read_hf_config(folder, trust_remote_code)
    rest = {name: tuple(found) for name, found in index["rest"].items()}
    return PackedModel(folder, folder.name, index["prefix"], scheme, layers, rest, hf_config, trust_remote_code)


def corrupt(found: str, expected: tuple[int, int], on_disk: bool) -> CorruptBase:
    """What to raise for bytes whose checksum is not the expected one; on_disk: they are damaged there, and removed."""
    where = "on this node's disk (removed: the next start builds it anew)" if on_disk else "between disk and GPU"
    return CorruptBase(
        f"{found} is not {expected}; damaged {where}. Not trained on: restart, and avoid this node if it repeats"
    )


def discard_damaged(packed: PackedModel, index: int) -> bool:
    """Whether a layer's file differs from its fingerprint; then it is removed, and the next start builds it anew."""
    layer = packed.layers[index]
    with suppress(FileNotFoundError):  # another rank of this node was first
        if fingerprint(packed.read_layer(index)) == layer.fingerprint:
            return False
    _discard(packed.folder, layer.file)
    return True


def _discard_damaged_rest(packed: PackedModel, name: str) -> bool:
    """As `discard_damaged`, for a tensor of what is not quantized."""
    with suppress(FileNotFoundError), safe_open(packed.folder / "rest.safetensors", "pt", device="cpu") as file:
        if fingerprint(file.get_tensor(name)) == packed.rest[name]:
            return False
    _discard(packed.folder, "rest.safetensors")
    return True


def _discard(folder: Path, file: str) -> None:
    """Remove a file, what is known of it and the index."""
    for name in ("index.json", Path(file).with_suffix(".json").name, file):
        (folder / name).unlink(missing_ok=True)


def _is_complete(folder: Path) -> bool:
    """Whether the index is there and every file has its size; what is torn is removed together with the index."""
    if not (folder / "index.json").is_file():
        return False
    torn = _torn_files(folder)
    for file in torn:
        _discard(folder, file)
    return not torn


def _torn_files(folder: Path) -> list[str]:
    """Files that are not as long as the index or their own header says."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except ValueError:
        return ["index.json"]
    torn = [layer["file"] for layer in index["layers"] if _size_of(folder / layer["file"]) != layer["size"]]
    return torn if _is_whole(folder / "rest.safetensors", index["rest"]) else [*torn, "rest.safetensors"]


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _is_whole(path: Path, names: Iterable[str]) -> bool:
    try:
        places = read_header(path)
        end = max(place.offset + place.length for place in places.values())
        return set(places) == set(names) and _size_of(path) == end
    except (FileNotFoundError, ValueError):
        return False


def _layer_from_json(layer: dict[str, Any]) -> PackedLayer:
    ranges = ("codes", "absmax", "absmax2", "mean")
    linears = {
        name: Stored(where["rows"], where["columns"], *(tuple(where[key]) for key in ranges))
        for name, where in layer["linears"].items()
    }
    return PackedLayer(layer["file"], layer["size"], linears, tuple(layer["fingerprint"]))
