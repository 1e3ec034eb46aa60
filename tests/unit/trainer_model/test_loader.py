"""The packed folder: shards of layers, what is not quantized, and builders that share, fail and are killed."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.sources import source_of
from transformers import AutoModelForCausalLM

from qlora_trainer.adapter import WEIGHTS
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import BadModel
from qlora_trainer.loader import PackedModel, ensure_packed, open_packed
from qlora_trainer.merge import merge
from qlora_trainer.model import build_model
from qlora_trainer.packing import FORMAT, build
from qlora_trainer.quant import Scheme, fingerprint
from qlora_trainer.sources import ensure_model
from qlora_trainer.weights import read_header, weight_files

CPU = torch.device("cpu")
SCHEME = Scheme("nf4", True, torch.bfloat16)
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from qlora_trainer import packing
from qlora_trainer.quant import Scheme

def write_half(file, source, dtype):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "killed":
    packing.write_tensor = write_half
else:
    print("ready", flush=True)
    sys.stdin.readline()
model_dir, folder = map(Path, sys.argv[1:3])
packing.build(model_dir, folder, Scheme("nf4", True, torch.bfloat16), torch.device("cpu"), staged=True)
"""


@pytest.fixture(scope="module")
def model_dir(checkpoint, tmp_path_factory) -> Path:
    """A tied checkpoint of six layers in two files, one of them without the base model's prefix."""
    folder = tmp_path_factory.mktemp("split")
    config = json.loads((checkpoint("llama-tied") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6, "layer_types": None}))
    tensors = load_file(checkpoint("llama-tied") / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name]:
        for layer in (2, 4):
            other = name.replace(".0.", f".{layer}.").replace(".1.", f".{layer + 1}.")
            tensors[other] = tensors[name] * (layer + 1)
    items = list(tensors.items())
    save_file(dict(items[::2]), folder / "a.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in items[1::2]}, folder / "b.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(model_dir, tmp_path_factory) -> Path:
    """What the caller's thread builds alone."""
    folder = tmp_path_factory.mktemp("reference")
    build(model_dir, folder, SCHEME, CPU)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "packed").mkdir()
    return tmp_path / "packed"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def start(model_dir: Path, folder: Path, fate: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(model_dir), str(folder), fate]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_threads_build_what_one_thread_builds(model_dir, reference, folder):
    build(model_dir, folder, SCHEME, CPU, staged=True)
    assert content(folder) == content(reference)


@pytest.mark.slow
def test_processes_build_together_what_a_killed_one_left(model_dir, reference, folder):
    killed, other = start(model_dir, folder, "killed"), start(model_dir, folder, "lives")
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, errors
    assert list(folder.glob("*.tmp")) and not (folder / "index.json").exists()
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("\n")
    other.stdin.flush()
    build(model_dir, folder, SCHEME, CPU, staged=True)
    _, errors = other.communicate(timeout=300)
    assert other.returncode == 0, errors
    assert content(folder) == content(reference)


def test_one_builders_error_ends_the_others(model_dir, folder, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "a.safetensors")
    name = next(name for name in tensors if "proj" in name)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, broken / "a.safetensors")
    with pytest.raises(BadModel, match=r"shape .* does not fit config.json"):
        build(broken, folder, SCHEME, CPU, staged=True)
    assert not list(folder.glob("*.tmp")) and not (folder / "index.json").exists()


def test_the_rest_is_what_the_checkpoint_holds(reference, model_dir):
    source = load_file(model_dir / "a.safetensors")
    for name, tensor in load_file(model_dir / "b.safetensors").items():
        source[name if name.startswith("lm_head") else f"model.{name}"] = tensor
    rest = open_packed(reference).read_rest(CPU)
    assert "model.embed_tokens.weight" in rest and "lm_head.weight" not in rest
    assert all(torch.equal(tensor, source[name].to(torch.bfloat16)) for name, tensor in rest.items())
    packed = {
        f"model.layers.{i}.{n}.weight" for i, layer in enumerate(open_packed(reference).layers) for n in layer.linears
    }
    assert rest.keys() | packed == source.keys()


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_shards_hold_the_blob_and_then_zeros(staged, size, reference):
    packed = open_packed(reference)
    shard = -(-packed.layers[0].size // size) + 100
    whole = []
    for rank in range(size + 1):  # the last lies beyond the end
        targets = [
            (index, rank * shard, (rank + 1) * shard, torch.full((shard + 5,), 7, dtype=torch.uint8))
            for index in range(len(packed.layers))
        ]
        packed.load_layers(iter(targets), staged)
        whole.append([destination for *_, destination in targets])
    for index, layer in enumerate(packed.layers):
        assert all(torch.equal(shards[index][-5:], torch.full((5,), 7, dtype=torch.uint8)) for shards in whole)
        blob = torch.cat([shards[index][:-5] for shards in whole])
        assert torch.equal(blob[: layer.size], packed.read_layer(index))
        assert fingerprint(blob[: layer.size].clone()) == layer.fingerprint
        assert not blob[layer.size :].any()


def test_a_subclass_overrides_read_layer_alone(reference):
    class Ones(PackedModel):
        def read_layer(self, index: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
            return torch.ones(self.layers[index].size, dtype=torch.uint8)[start:stop]

    packed = open_packed(reference)
    size = packed.layers[1].size
    destination = torch.full((20,), 7, dtype=torch.uint8)
    Ones(**vars(packed)).load_layers([(1, size - 8, size + 4, destination)], staged=True)
    assert destination.tolist() == [1] * 8 + [0] * 4 + [7] * 8


def test_a_torn_layer_says_what_to_do_and_is_built_anew(checkpoint, config_of, cache):
    config = config_of()
    packed = ensure_packed(config, source_of(checkpoint()), cache, CPU)
    path, size = packed.folder / packed.layers[1].file, packed.layers[1].size
    whole = path.read_bytes()
    path.write_bytes(whole[: size // 2])
    with pytest.raises(BadModel, match=f"ends at byte {size // 2}, .*Delete it"):
        packed.load_layers([(1, 0, size, torch.empty(size, dtype=torch.uint8))], staged=True)
    ensure_packed(config, source_of(checkpoint()), cache, CPU)
    assert path.read_bytes() == whole
    assert json.loads((packed.folder / "index.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize("torn", ["index.json", "rest.safetensors", "rest.json", "layer-00001.bin", "layer-00001.json"])
def test_what_a_crash_of_the_node_tore_is_built_anew(torn, checkpoint, config_of, cache):
    config = config_of()
    packed = ensure_packed(config, source_of(checkpoint()), cache, CPU)
    whole = content(packed.folder)
    (packed.folder / torn).write_bytes(whole[torn][:1000] if torn == "rest.safetensors" else b"")
    if torn.startswith(("layer", "rest.json")):  # before the index was written
        (packed.folder / "index.json").unlink()
    assert content(ensure_packed(config, source_of(checkpoint()), cache, CPU).folder) == whole


def test_weights_that_were_edited_in_place_are_another_base(model_dir, config_of, tmp_path, cache):
    """Any byte counts: the file keeps its size and its header."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    path = folder / "a.safetensors"
    save_file(load_file(path) | {"model.embed_tokens.weight": torch.randn(16384, 64)}, path)
    changes = {"vocab_size": 16384}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    config = config_of(model={"uri": f"file://{folder}"})

    def pack(run: str) -> PackedModel:
        env = WorkerEnv(0, 0, 1, 1, tmp_path / run, cache, tmp_path, "cpu")
        return ensure_packed(config, ensure_model(config, env), cache, CPU)

    before, again = pack("before"), pack("again")
    assert before.folder == again.folder
    with path.open("r+b") as file:
        file.seek(read_header(path)["model.embed_tokens.weight"].offset + 100_003)
        file.write(b"\x41")
    after = pack("after")
    assert after.folder != before.folder
    name = "model.embed_tokens.weight"
    assert not torch.equal(after.read_rest(CPU)[name], before.read_rest(CPU)[name])


def test_a_model_may_be_named_by_its_file(checkpoint, config_of, tmp_path, cache):
    """What is read beside the file is in the digest, too."""
    env = WorkerEnv(0, 0, 1, 1, tmp_path, cache, tmp_path, "cpu")
    source = ensure_model(config_of(model={"uri": f"file://{checkpoint()}/model.safetensors"}), env)
    assert source.path == checkpoint() and "config.json" in source.files


def test_weights_in_other_folders_are_refused(tmp_path):
    names = {"weight_map": {"a": "model.safetensors", "b": "more/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(BadModel, match="put all of them beside it"):
        weight_files(tmp_path)


def test_a_model_with_code_of_its_own(checkpoint, config_of, tmp_path, cache):
    """It is built, trained and merged by its code, which goes wherever its config.json goes."""
    folder, out = tmp_path / "custom", tmp_path / "out"
    shutil.copytree(checkpoint(), folder)
    out.mkdir()
    (folder / "configuration_custom.py").write_text(
        "from transformers import LlamaConfig\nclass CustomConfig(LlamaConfig):\n    model_type = 'custom'\n"
    )
    (folder / "modeling_custom.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_custom import CustomConfig\n"
        "class CustomModel(LlamaForCausalLM):\n    config_class = CustomConfig\n"
    )
    names = {"AutoConfig": "configuration_custom.CustomConfig", "AutoModelForCausalLM": "modeling_custom.CustomModel"}
    changes = {"model_type": "custom", "architectures": ["CustomModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    config = config_of(model={"uri": f"file://{folder}", "trustRemoteCode": True})
    source = ensure_model(config, WorkerEnv(0, 0, 1, 1, tmp_path, cache, tmp_path, "cpu"))
    packed = ensure_packed(config, source, cache, CPU)
    model = build_model(config, packed, None, CPU, 1)
    assert type(model.hf_model).__name__ == "CustomModel"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    save_file({}, adapter / WEIGHTS)
    list(merge(packed, adapter, source.path, out, CPU))
    merged = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(merged).__name__ == "CustomModel" and merged.config.use_cache and merged.dtype == torch.bfloat16
