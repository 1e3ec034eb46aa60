"""The quantized base on disk: built once per node from safetensors, memory-mapped by every later start.

`cache_dir/packed/DIGEST/` holds one flat blob of bytes a decoder layer (`layer-00000.bin`), what is not quantized
(`rest.safetensors`: embeddings, norms, biases, head), `config.json` and `index.json`, written last: the folder is
complete when the index is there. Nothing in it knows a world size.

Rules: at most one layer is in memory; whichever processes or pods of a node get here share the layers out by file
locks, each layer is replaced atomically, and a killed builder's layer is taken over by the next. The fingerprint of a
layer is taken on the device that quantized it, before the bytes leave it: it covers every copy that follows.
"""

import hashlib
import json
import mmap
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_api.run import TrainConfig
from qlora_trainer.errors import BadModel
from qlora_trainer.quant import FP_TYPES, Scheme, Stored, Tables, align, fingerprint, place, quantize_into, read_tables
from qlora_trainer.skeleton import CausalLM, build_skeleton, decoder_layers, decoder_linears, read_hf_config

FORMAT = 1
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer: its linears (name within the layer) in a blob of `size` bytes."""

    file: str
    size: int
    linears: dict[str, Stored]
    fingerprint: tuple[int, int]


@dataclass(frozen=True)
class PackedModel:
    """A complete packed folder. `prefix` is the module path of the decoder layers (`model.layers`)."""

    folder: Path
    digest: str
    prefix: str
    scheme: Scheme
    layers: list[PackedLayer]
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

    def read_rest(self, device: torch.device, on_host: str = "") -> dict[str, Tensor]:
        """What is not quantized, by parameter name; `on_host` stays in host memory, mapped from the file."""
        path, cpu = self.folder / "rest.safetensors", torch.device("cpu")
        with safe_open(path, "pt", device=str(device)) as fast, safe_open(path, "pt", device="cpu") as mapped:
            names = [name for name in fast.keys() if not name.startswith("tables.")]  # noqa: SIM118 - not a dict
            where = {name: mapped if name == on_host or device == cpu else fast for name in names}
            return {name: file.get_tensor(name) for name, file in where.items()}

    def read_tables(self, device: torch.device) -> Tables:
        """The code books of dequantization."""
        with safe_open(self.folder / "rest.safetensors", "pt", device=str(device)) as file:
            return Tables(file.get_tensor("tables.code4"), file.get_tensor("tables.code8"))


def ensure_packed(config: TrainConfig, model_dir: Path, cache_dir: Path, device: torch.device) -> PackedModel:
    """The packed base of `model_dir` under `cache_dir`, built if need be on `device`. Raises BadModel."""
    spec = config.spec
    quantization = spec.quantization
    scheme = Scheme(quantization.type, quantization.double_quant, FP_TYPES[quantization.storage_dtype])
    digest = digest_of(model_dir, scheme, device.type)
    folder = cache_dir / "packed" / digest
    if not _is_complete(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _Builder(model_dir, folder, scheme, device, spec.model.trust_remote_code).run()
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
    return PackedModel(folder, folder.name, index["prefix"], scheme, layers, hf_config, trust_remote_code)


def discard_damaged(packed: PackedModel, index: int) -> bool:
    """Whether a layer's file differs from its fingerprint; then it is removed, and the next start builds it anew."""
    layer = packed.layers[index]
    if fingerprint(packed.read_layer(index)) == layer.fingerprint:
        return False
    for name in ("index.json", layer.file.replace(".bin", ".json"), layer.file):
        (packed.folder / name).unlink(missing_ok=True)
    return True


def _is_complete(folder: Path) -> bool:
    """Whether the index is there and every file has its size; a torn layer is removed together with the index."""
    if not (folder / "index.json").is_file():
        return False
    torn = [
        layer["file"]
        for layer in json.loads((folder / "index.json").read_text())["layers"]
        if not (folder / layer["file"]).is_file() or (folder / layer["file"]).stat().st_size != layer["size"]
    ]
    for file in torn:
        for name in ("index.json", file.replace(".bin", ".json"), file):
            (folder / name).unlink(missing_ok=True)
    return not torn


def digest_of(model_dir: Path, scheme: Scheme, device_type: str) -> str:
    """Key of the packed folder: the scheme, the kind of device, config.json, and of every file size, header, samples.

    The kind of device, because bitsandbytes rounds ties differently on CPU and GPU. Samples, because hashing all of a
    140 GB model would take minutes at every start; two models that agree in all of this are the same.
    """
    state = hashlib.sha256(f"{FORMAT} {scheme.type} {scheme.double} {scheme.dtype} {device_type}".encode())
    state.update((model_dir / "config.json").read_bytes())
    for path in weight_files(model_dir):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
            state.update(f"{path.name} {size}".encode() + file.read(header))
            for sample in range(_SAMPLES):
                file.seek(8 + header + (size - 8 - header) * sample // _SAMPLES)
                state.update(file.read(_SAMPLE_BYTES))
    return state.hexdigest()[:32]


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model folder: those that its index names, else all. Raises BadModel."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return [model_dir / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    files = sorted(path for path in model_dir.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise BadModel(f"{model_dir} has no *.safetensors: convert the weights (pickled *.bin are never read)")
    return files


class Weights:
    """The tensors of a safetensors folder by parameter name, read one at a time onto a device."""

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        self._device = device
        self._files: dict[str, safe_open] = {}
        for path in weight_files(model_dir):
            handle = safe_open(path, "pt", device=str(device))
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def get(self, name: str) -> Tensor:
        """One tensor on the device; tolerates a checkpoint saved with or without the base model's prefix."""
        for alias in (name, name.partition(".")[2], f"model.{name}", f"language_model.{name}"):
            if alias in self._files:
                tensor: Tensor = self._files[alias].get_tensor(alias)
                return tensor
        raise BadModel(f"the model's weight files lack {name}: its config.json and weights do not belong together")

    def __contains__(self, name: str) -> bool:
        return any(a in self._files for a in (name, name.partition(".")[2], f"model.{name}", f"language_model.{name}"))


class _Builder:
    """Builds one packed folder, together with any other process that builds the same one."""

    def __init__(
        self, model_dir: Path, folder: Path, scheme: Scheme, device: torch.device, trust_remote_code: bool
    ) -> None:
        self._folder, self._scheme, self._device = folder, scheme, device
        self._hf_config = read_hf_config(model_dir, trust_remote_code)
        self._skeleton = build_skeleton(self._hf_config, scheme.dtype, trust_remote_code)
        self._prefix, layers = decoder_layers(self._skeleton)
        self._linears: list[dict[str, nn.Linear]] = [{} for _ in layers]
        for index, name, module in decoder_linears(self._skeleton):
            self._linears[index][name] = module
        self._weights = Weights(model_dir, device)

    def run(self) -> None:
        """Build every layer that nobody has built, wait for those that others build, write the index."""
        jobs = {f"layer-{index:05d}": index for index in range(len(self._linears))} | {"rest": -1}
        for wait in (False, True):  # first whatever is free, then what others left behind
            for name, index in jobs.items():
                self._claim(name, index, wait)
        with FileLock(self._folder / "index.lock"):
            if not (self._folder / "index.json").is_file():
                self._write_index()

    def _claim(self, name: str, index: int, wait: bool) -> None:
        done = self._folder / ("rest.safetensors" if index < 0 else f"{name}.json")
        if done.is_file():
            return
        try:
            with FileLock(self._folder / f"{name}.lock", timeout=-1 if wait else 0):
                if not done.is_file():
                    self._write_rest() if index < 0 else self._write_layer(name, index)
        except Timeout:
            return

    def _write_layer(self, name: str, index: int) -> None:
        stored: dict[str, Stored] = {}
        end = 0
        for linear, module in self._linears[index].items():
            stored[linear] = place(self._scheme, module.out_features, module.in_features, end)
            end = stored[linear].end
        blob = torch.zeros(align(end), dtype=torch.uint8, device=self._device)
        for linear, where in stored.items():
            weight = self._weights.get(f"{self._prefix}.{index}.{linear}.weight")
            if tuple(weight.shape) != (where.rows, where.columns):
                raise BadModel(f"{linear} of layer {index}: shape {tuple(weight.shape)} does not fit config.json")
            quantize_into(blob, where, self._scheme, weight)
        layer = PackedLayer(f"{name}.bin", blob.numel(), stored, fingerprint(blob))
        _replace(self._folder / layer.file, blob.cpu().numpy().data)
        _replace(self._folder / f"{name}.json", json.dumps(asdict(layer)).encode())

    def _write_rest(self) -> None:
        packed = {f"{self._prefix}.{i}.{name}.weight" for i, linears in enumerate(self._linears) for name in linears}
        rest = {}
        for name in _rest_names(self._skeleton, packed):
            if name in self._weights or not _is_tied(self._skeleton, name):
                rest[name] = self._weights.get(name).to(self._scheme.dtype).cpu().contiguous()
        tables = read_tables(self._scheme)
        rest |= {"tables.code4": tables.code4, "tables.code8": tables.code8}
        self._hf_config.save_pretrained(self._folder)
        temporary = self._folder / f"rest.{uuid.uuid4().hex}.tmp"
        save_file(rest, temporary)
        temporary.replace(self._folder / "rest.safetensors")

    def _write_index(self) -> None:
        layers = [json.loads((self._folder / f"layer-{i:05d}.json").read_text()) for i in range(len(self._linears))]
        scheme = {"type": self._scheme.type, "double": self._scheme.double, "dtype": str(self._scheme.dtype)[6:]}
        index = {"format": FORMAT, "prefix": self._prefix, "scheme": scheme, "layers": layers}
        _replace(self._folder / "index.json", json.dumps(index).encode())


def _rest_names(skeleton: nn.Module, packed: set[str]) -> Iterator[str]:
    """Names of the parameters and persistent buffers that are not packed (a tied one counts once)."""
    yield from (name for name, _ in skeleton.named_parameters() if name not in packed)
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in skeleton.named_modules()
        for name in module._non_persistent_buffers_set
    }
    yield from (name for name, _ in skeleton.named_buffers() if name not in transient)


def _is_tied(skeleton: CausalLM, name: str) -> bool:
    """Whether the parameter repeats another one (the head of a model with tied embeddings)."""
    head = skeleton.get_output_embeddings()
    tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    return (
        tied
        and head is not None
        and any(name.endswith(f"{n}.weight") for n, m in skeleton.named_modules() if m is head)
    )


def _layer_from_json(layer: dict[str, Any]) -> PackedLayer:
    ranges = ("codes", "absmax", "absmax2", "mean")
    linears = {
        name: Stored(where["rows"], where["columns"], *(tuple(where[key]) for key in ranges))
        for name, where in layer["linears"].items()
    }
    return PackedLayer(layer["file"], layer["size"], linears, tuple(layer["fingerprint"]))


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Write beside `path`, then rename. No fsync: what a crash of the node tears, sizes and fingerprints find."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
