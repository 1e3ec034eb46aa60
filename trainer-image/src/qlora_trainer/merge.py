"""The adapter merged into its base: bf16 safetensors, one file a decoder layer, one layer in memory.

    python -m qlora_trainer.merge --config CONFIG --out FOLDER [--adapter FOLDER]

A weight becomes dequantize(W) + scale * B A in float32 (with DoRA: times magnitude over row norm), rounded once to
bfloat16, which is what PEFT's merge gives on the dequantized base. Without --adapter the run's published one is taken.
"""

import argparse
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_api.layout import MANIFEST, RunLayout
from qlora_api.run import CONFIG_PATH
from qlora_trainer.adapter import WEIGHTS, find_published
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadAdapter, TrainerError
from qlora_trainer.loader import PackedModel, corrupt, discard_damaged, ensure_packed
from qlora_trainer.lora import PEFT_PREFIX
from qlora_trainer.output import open_output
from qlora_trainer.quant import dequantize, fingerprint
from qlora_trainer.sources import ensure_model
from qlora_trainer.storage import ObjectStore

INDEX = "model.safetensors.index.json"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Delta:
    """An adapter on disk: its tensors are read as they are needed."""

    folder: Path
    scale: float

    @classmethod
    def open(cls, folder: Path) -> "Delta":
        """From PEFT's two files. Raises BadAdapter."""
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
        except (OSError, ValueError) as error:
            raise BadAdapter(
                f"{folder}: no readable adapter_config.json ({error}): name a folder that peft wrote"
            ) from error
        rank, alpha = config["r"], config["lora_alpha"]
        return cls(folder, alpha / (rank**0.5 if config.get("use_rslora") else rank))

    def apply(self, weight: Tensor, path: str) -> Tensor:
        """The merged weight (float32, in place where it can be) of the linear at `path`."""
        name = f"{PEFT_PREFIX}{path}"
        with safe_open(self.folder / WEIGHTS, "pt", device=str(weight.device)) as file:
            names = set(file.keys())
            if f"{name}.lora_A.weight" not in names:
                return weight
            a, b = file.get_tensor(f"{name}.lora_A.weight"), file.get_tensor(f"{name}.lora_B.weight")
            weight = weight.add_((b.float() @ a.float()).mul_(self.scale))
            if f"{name}.lora_magnitude_vector" in names:
                magnitude = file.get_tensor(f"{name}.lora_magnitude_vector")
                weight = (magnitude / weight.norm(dim=1)).unsqueeze(1) * weight
        return weight


def merge(packed: PackedModel, adapter: Path, tokenizer: Path, out: Path, device: torch.device) -> Iterator[Path]:
    """Write the merged model into `out`, yielding every file that is complete (the caller may take it away).

    On `device`, as long as it has the memory for one weight more. Raises BadAdapter, CorruptBase, OSError.
    """
    delta = Delta.open(adapter)
    count = len(packed.layers) + 1
    where: dict[str, str] = {}
    size = 0
    for number in range(count):
        if number == 0:
            tensors = packed.read_rest(_CPU)
        else:
            tensors = _merged_layer(packed, number - 1, delta, device)
        state = {name: tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        path = out / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        where |= dict.fromkeys(state, path.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        yield path
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1))
    yield out / INDEX
    yield from _write_config(packed, tokenizer, out)


def _merged_layer(packed: PackedModel, index: int, delta: Delta, device: torch.device) -> dict[str, Tensor]:
    """bfloat16, on the CPU."""
    try:
        tables, blob = packed.read_tables(device), packed.read_layer(index).to(device)
        if (found := fingerprint(blob)) != (wanted := packed.layers[index].fingerprint):
            raise corrupt(f"decoder layer {index}: checksum {found}", wanted, discard_damaged(packed, index))
        tensors = {}
        for name, stored in packed.layers[index].linears.items():
            path = f"{packed.prefix}.{index}.{name}"
            out = torch.empty(stored.rows, stored.columns, dtype=packed.scheme.dtype, device=device)
            weight = dequantize(blob, stored, packed.scheme, tables, out).float()
            tensors[f"{path}.weight"] = delta.apply(weight, path).to("cpu", torch.bfloat16)
        return tensors
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    return _merged_layer(packed, index, delta, _CPU)  # beside a model that trains there may be no room


def _write_config(packed: PackedModel, tokenizer: Path, out: Path) -> list[Path]:
    """config.json for bfloat16, the code that it refers to, and the tokenizer's files."""
    kinds = {".json", ".model", ".txt", ".jinja"} | ({".py"} if packed.trust_remote_code else set())
    hf_config = copy.deepcopy(packed.hf_config)
    hf_config.dtype = torch.bfloat16
    hf_config.save_pretrained(out)
    written = [out / "config.json"]
    for path in sorted(tokenizer.iterdir()):
        if path.suffix in kinds and path.name not in ("config.json", INDEX):
            written.append(Path(shutil.copy(path, out / path.name)))
    return written


def merge_to_store(
    packed: PackedModel, adapter: Path, tokenizer: Path, store: ObjectStore, key: str, device: torch.device
) -> Iterator[str]:
    """Merge and upload file by file, yielding the keys; the local disk never holds more than one."""
    with tempfile.TemporaryDirectory(prefix="merge-") as name:
        for path in merge(packed, adapter, tokenizer, Path(name), device):
            store.put(f"{key}/{path.name}", path)
            path.unlink()
            yield f"{key}/{path.name}"


def main() -> None:
    """The command."""
    from qlora_trainer.group import device_of
    from qlora_trainer.train import read_config

    parser = argparse.ArgumentParser(
        prog="python -m qlora_trainer.merge", description="Merge an adapter into its base."
    )
    parser.add_argument("--config", type=Path, default=Path(CONFIG_PATH), help="the run's configuration (TrainConfig)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model")
    parser.add_argument("--adapter", type=Path, help="folder of the adapter; default: the run's published one")
    arguments = parser.parse_args()
    config, env = read_config(arguments.config), WorkerEnv.of_environment()
    model = ensure_model(config, env)
    packed = ensure_packed(config, model, env.cache_dir, device_of(env))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        adapter = arguments.adapter or _fetch_adapter(*open_output(config, env), Path(name))
        for path in merge(packed, adapter, model.path, arguments.out, device_of(env)):
            print(path, flush=True)


def _fetch_adapter(store: ObjectStore, layout: RunLayout, folder: Path) -> Path:
    published = find_published(store)
    if published is None:
        raise TrainerError(f"{layout.root} has no {MANIFEST}: the run has published no adapter; give --adapter")
    key = layout.key(published.adapter_uri)
    for name in ("adapter_config.json", WEIGHTS):
        with store.get(f"{key}/{name}") as stream, (folder / name).open("wb") as out:
            shutil.copyfileobj(stream, out)
    return folder


if __name__ == "__main__":
    main()
