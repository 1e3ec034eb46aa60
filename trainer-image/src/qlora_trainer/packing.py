"""Builds the quantized base of a node: safetensors in, one flat blob of bytes a decoder layer out (see `loader`).

Rules: whichever processes or pods of a node get here share the layers out by file locks, each layer is replaced
atomically, and a killed builder's layer is taken over by the next. On a GPU a process has NUM_BUILDERS layers in hand,
of each one weight and the packed bytes; on a CPU one layer, its weights mapped. The fingerprint of a layer is taken on
the device that quantized it, before the bytes leave it: it covers every copy that follows; those of what is not
quantized, one a tensor, are taken of the file as it was written. All quantization is on the
device's default stream: bitsandbytes launches its kernels there, whatever stream is current.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn

from qlora_trainer.errors import BadModel
from qlora_trainer.quant import Scheme, Stored, align, fingerprint, place, quantize_into, read_tables
from qlora_trainer.skeleton import CausalLM, build_skeleton, decoder_layers, decoder_linears, read_hf_config
from qlora_trainer.staging import Stager, finish, write_tensor
from qlora_trainer.weights import Place, Weights, read_header, read_tensors, write_safetensors

FORMAT = 2
NUM_BUILDERS = 3  # threads a GPU: one writes while another reads, and one more for what is not quantized
_POLL_SECONDS = 0.01  # between looks at a layer that another process builds


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer: its linears (name within the layer) in a blob of `size` bytes."""

    file: str
    size: int
    linears: dict[str, Stored]
    fingerprint: tuple[int, int]


def key_of(model_digest: str, scheme: Scheme, device_type: str) -> str:
    """Name of the packed folder; model_digest: over all content of the model's files (`Source.digest`).

    The kind of device, because bitsandbytes rounds ties differently on CPU and GPU.
    """
    made_of = f"{FORMAT} {scheme.type} {scheme.double} {scheme.dtype} {device_type} {model_digest}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]


def build(
    model_dir: Path,
    folder: Path,
    scheme: Scheme,
    device: torch.device,
    trust_remote_code: bool = False,
    staged: bool | None = None,
) -> None:
    """Complete the packed folder of `model_dir`, quantized on `device`. Raises BadModel, OSError.

    staged: several threads build, and weights come through a stager (on GPUs); else the caller's thread builds and
    weights are mapped (on CPUs).
    """
    if not (device.type == "cuda" if staged is None else staged):
        _Builder(model_dir, folder, scheme, device, trust_remote_code).run()
        return
    with Stager(device) as stager:
        _Builder(model_dir, folder, scheme, stager.device, trust_remote_code, stager).run()


class _Builder:
    """Builds one packed folder, together with any other process that builds the same one."""

    def __init__(
        self,
        model_dir: Path,
        folder: Path,
        scheme: Scheme,
        device: torch.device,
        trust_remote_code: bool,
        stager: Stager | None = None,
    ) -> None:
        self._folder, self._scheme, self._device, self._stager = folder, scheme, device, stager
        self._hf_config = read_hf_config(model_dir, trust_remote_code)
        self._skeleton = build_skeleton(self._hf_config, scheme.dtype, trust_remote_code)
        self._prefix, layers = decoder_layers(self._skeleton)
        self._linears: list[dict[str, nn.Linear]] = [{} for _ in layers]
        for index, name, module in decoder_linears(self._skeleton):
            self._linears[index][name] = module
        self._weights = Weights(model_dir)
        self._code = sorted(model_dir.glob("*.py")) if trust_remote_code else []  # what config.json refers to

    def run(self) -> None:
        """Build every layer that nobody has built, wait for those that others build, write the index."""
        for wait in (False, True):  # first whatever is free, then what others left behind
            if self._stager is None:
                for index in range(-1, len(self._linears)):
                    self._claim(index, wait)
                continue
            with ThreadPoolExecutor(NUM_BUILDERS, "packing", self._begin_thread) as pool:
                finish([pool.submit(self._claim, index, wait) for index in range(-1, len(self._linears))])
        with FileLock(self._folder / "index.lock"):
            if not (self._folder / "index.json").is_file():
                self._write_index()

    def _begin_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has a current device, at first number 0

    def _claim(self, index: int, wait: bool) -> None:
        """Write layer `index` (-1: what is not quantized, the longest of all) unless it is there or another's."""
        name = "rest" if index < 0 else f"layer-{index:05d}"
        done = self._folder / f"{name}.json"
        if _is_written(done):
            return
        try:
            with FileLock(self._folder / f"{name}.lock", timeout=-1 if wait else 0, poll_interval=_POLL_SECONDS):
                if not _is_written(done):
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
            quantize_into(blob, where, self._scheme, self._weight(index, linear, where))  # gone before the next comes
        layer = PackedLayer(f"{name}.bin", blob.numel(), stored, fingerprint(blob))
        with _replaced(self._folder / layer.file) as temporary, open(temporary, "wb") as file:
            write_tensor(file, blob, torch.uint8)
        with _replaced(self._folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(asdict(layer)))

    def _weight(self, index: int, linear: str, where: Stored) -> Tensor:
        weight = self._weights.get(f"{self._prefix}.{index}.{linear}.weight", self._stager)
        if tuple(weight.shape) != (where.rows, where.columns):
            raise BadModel(f"{linear} of layer {index}: shape {tuple(weight.shape)} does not fit config.json")
        return weight.to(self._device)

    def _write_rest(self) -> None:
        packed = {f"{self._prefix}.{i}.{name}.weight" for i, linears in enumerate(self._linears) for name in linears}
        names = [
            n for n in _rest_names(self._skeleton, packed) if n in self._weights or not _is_tied(self._skeleton, n)
        ]
        rest = [(name, self._weights.get(name), self._scheme.dtype) for name in names]  # mapped: no memory yet
        tables = read_tables(self._scheme)
        rest += [("tables.code4", tables.code4, torch.float32), ("tables.code8", tables.code8, torch.float32)]
        self._hf_config.save_pretrained(self._folder)
        for path in self._code:
            shutil.copyfile(path, self._folder / path.name)
        with _replaced(self._folder / "rest.safetensors") as temporary:
            write_safetensors(temporary, rest)
            places = read_header(temporary)
            fingerprints = {name: fingerprint(self._read_back(name, place)) for name, place in places.items()}
        with _replaced(self._folder / "rest.json") as temporary:
            temporary.write_text(json.dumps(fingerprints))

    def _read_back(self, name: str, place: Place) -> Tensor:
        if self._stager is not None:
            return read_tensors({name: place}, self._stager)[name]
        with safe_open(place.path, "pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)  # mapped
            return tensor

    def _write_index(self) -> None:
        layers = [json.loads((self._folder / f"layer-{i:05d}.json").read_text()) for i in range(len(self._linears))]
        scheme = {"type": self._scheme.type, "double": self._scheme.double, "dtype": str(self._scheme.dtype)[6:]}
        rest = json.loads((self._folder / "rest.json").read_text())
        index = {"format": FORMAT, "prefix": self._prefix, "scheme": scheme, "layers": layers, "rest": rest}
        with _replaced(self._folder / "index.json") as temporary:
            temporary.write_text(json.dumps(index))


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


def _is_written(path: Path) -> bool:
    """A file that a crash of the node tore is most often there and empty."""
    return path.is_file() and path.stat().st_size > 0


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place; the caller holds the lock, so what a killed builder left is replaced.

    No fsync: sizes and fingerprints find what a crash of the node tears.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
