"""The streamed merge equals PEFT's merge on the dequantized base."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_api.run import TrainConfig
from qlora_trainer import control, merge, progress
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import CorruptBase
from qlora_trainer.loader import PackedModel
from qlora_trainer.quant import dequantize
from qlora_trainer.session import prepare
from qlora_trainer.storage import FileStore
from qlora_trainer.train import work

CPU = torch.device("cpu")
MERGED = {"merge": True}

read_tables = PackedModel.read_tables


def dequantized_base(packed: Any, base: Path) -> Any:
    """transformers' model in float32 with the weights that the trainer computes with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tables = packed.read_tables(CPU)
    for index, layer in enumerate(packed.layers):
        blob = packed.read_layer(index)
        for name, stored in layer.linears.items():
            out = torch.empty(stored.rows, stored.columns, dtype=packed.scheme.dtype)
            weight = model.get_submodule(f"{packed.prefix}.{index}.{name}").weight
            weight.data = dequantize(blob, stored, packed.scheme, tables, out).float()
    return model


def work_while_the_others_move(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker whose uploads of merged files, the first one apart, wait until every rank gave a sign of life."""
    put, seen = FileStore.put, dict[Path, int]()

    def slow_put(store: FileStore, key: str, data: Any, if_none_match: bool = False) -> bool:
        if key.startswith("merged/"):
            for run_dir in env.run_dir.parent.glob("pod-*"):
                end = time.monotonic() + 60
                while (now := activity(run_dir)) <= seen.get(run_dir, -1):
                    assert time.monotonic() < end, f"{run_dir.name} showed no sign of life while {key} was made"
                    time.sleep(0.01)
                seen[run_dir] = now
        return put(store, key, data, if_none_match)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileStore, "put", slow_put)
        patch.setattr(progress, "_ALIVE_SECONDS", 0.0)
        work(config, env)


def activity(run_dir: Path) -> int:
    state = control.read_worker_state(run_dir, 0)
    assert state is not None
    return state.activity


def test_all_ranks_show_signs_of_life_while_one_merges(make_world: Callable[..., Any]) -> None:
    world = make_world("merge", output=MERGED, training={"maxSteps": 2})
    world.entry = work_while_the_others_move
    assert world.run([0, 1]) == [0, 0]
    assert len(list((world.root / "bucket").glob("*/merged/gen-00001/*.safetensors"))) == 3
    assert world.state(1).artifacts == world.state(0).artifacts


def test_a_layer_that_is_damaged_is_not_merged(make_world: Callable[..., Any], tmp_path: Path) -> None:
    world = make_world("merge", training={"maxSteps": 2})
    assert world.run([0]) == [0]
    prepared = prepare(world.config, world.env(0))
    file = prepared.packed.folder / prepared.packed.layers[1].file
    content = bytearray(file.read_bytes())
    content[100] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptBase, match=r"decoder layer 1: .*removed: the next start builds it anew"):
        list(merge.merge(prepared.packed, world.adapter_folder(), prepared.model.path, tmp_path, CPU))


@pytest.mark.parametrize(
    "lora", [{"useRslora": True}, {"useDora": True}, {"targetModules": ["q_proj", "down_proj"]}], ids=str
)
def test_equals_pefts_merge(make_world: Callable[..., Any], lora: dict[str, Any]) -> None:
    from peft import PeftModel

    quantization = {"computeDtype": "bfloat16", "storageDtype": "bfloat16"}
    world = make_world("merge", output=MERGED, lora=lora, training={"maxSteps": 2}, quantization=quantization)
    assert world.run([0]) == [0]
    root = world.root / "bucket" / "run-01234567"
    assert (
        json.loads((root / "manifest.json").read_text())["artifacts"]["mergedUri"] == f"file://{root}/merged/gen-00001"
    )
    index = json.loads((root / "merged/gen-00001" / merge.INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 3, "what is not quantized, and two layers"

    prepared = prepare(world.config, world.env(0))
    base = dequantized_base(prepared.packed, prepared.model.path)
    theirs = PeftModel.from_pretrained(base, str(world.adapter_folder())).merge_and_unload().state_dict()
    for name, file in index["weight_map"].items():
        ours = load_file(root / "merged/gen-00001" / file)[name]
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs[name].to(torch.bfloat16)), name


def full(device: torch.device) -> None:
    """A GPU without room."""
    if device.type == "cuda":
        raise torch.OutOfMemoryError


def test_the_merged_model_loads_and_the_command_writes_the_same(
    make_world: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    world = make_world("merge", training={"maxSteps": 2})
    assert world.run([0]) == [0]
    adapter, out = world.adapter_folder(), tmp_path / "out"
    config = world.config.to_wire()
    config["spec"]["output"]["uri"] = "s3://unused/here"
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "qlora_trainer.merge", "--config", tmp_path / "config.json"]
    env = {"QLORA_CACHE_DIR": str(world.root / "cache"), "QLORA_RUN_DIR": str(tmp_path / "run"), "QLORA_DEVICE": "cpu"}
    subprocess.run([*command, "--adapter", adapter, "--out", out], check=True, env={**env, "PATH": "/usr/bin"})
    prepared = prepare(world.config, world.env(0))
    merge_here = tmp_path / "here"
    merge_here.mkdir()
    monkeypatch.setattr(PackedModel, "read_tables", lambda self, device: full(device) or read_tables(self, device))
    files = list(merge.merge(prepared.packed, adapter, prepared.model.path, merge_here, torch.device("cuda")))
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in files} and "tokenizer.json" in names
    assert all((out / name).read_bytes() == (merge_here / name).read_bytes() for name in names)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.use_cache, "of the model as it is used, not as it is trained"
    assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(out)("the fox")["input_ids"]
