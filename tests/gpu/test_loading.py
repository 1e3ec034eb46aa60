"""Loading through pinned buffers and streams: the bytes of a plain copy, no more memory, no race with the caller."""

import pytest
import torch
from gpu_shapes import write_checkpoint

from qlora_trainer.loader import open_packed
from qlora_trainer.packing import build
from qlora_trainer.quant import Scheme
from qlora_trainer.staging import ReadJob, Stager

SCHEME = Scheme("nf4", True, torch.bfloat16)
NUM_BYTES = 1 << 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    write_checkpoint(folder / "model", "tiny", 2)
    (folder / "packed").mkdir()
    build(folder / "model", folder / "packed", SCHEME, torch.device("cuda"))
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_many_threads_build_what_one_thread_builds(kind, dtype, folder, tmp_path, gpu):
    for staged in (False, True):
        (tmp_path / str(staged)).mkdir()
        build(folder / "model", tmp_path / str(staged), Scheme(kind, True, dtype), gpu, staged=staged)
    assert content(tmp_path / "True") == content(tmp_path / "False")


def test_what_is_loaded_is_what_is_on_disk(folder, gpu):
    packed = open_packed(folder / "packed")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    half = packed.layers[0].size // 2 + 1000
    targets = [(i, half, 2 * half, torch.empty(half, dtype=torch.uint8, device=gpu)) for i in range(len(packed.layers))]
    packed.load_layers(targets)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    rest = packed.read_rest(gpu, "model.embed_tokens.weight")
    largest = max(tensor.nbytes for tensor in rest.values() if tensor.is_cuda)
    checksum = 2 * largest + (1 << 16)  # what it takes for a while
    assert torch.cuda.max_memory_allocated() <= torch.cuda.memory_allocated() + checksum
    assert torch.cuda.memory_allocated() - before < 1.1 * (
        2 * half + packed.folder.joinpath("rest.safetensors").stat().st_size
    )
    for index, _, _, loaded in targets:
        expected = packed.read_layer(index, half)
        assert torch.equal(loaded[: expected.numel()].cpu(), expected)
        assert not loaded[expected.numel() :].any()
    expected = packed.read_rest(torch.device("cpu"))
    assert rest.keys() == expected.keys()
    assert not rest["model.embed_tokens.weight"].is_cuda and rest["lm_head.weight"].is_cuda
    assert all(torch.equal(rest[name].cpu(), tensor) for name, tensor in expected.items())


def test_copies_wait_for_what_the_memory_is_still_used_for(tmp_path, gpu):
    """The memory of a freed tensor that a kernel has yet to fill is given to the destination."""
    wanted = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8)
    (tmp_path / "bytes").write_bytes(wanted.numpy().tobytes())
    with Stager(gpu) as stager:
        for _ in range(3):
            stale = torch.empty(NUM_BYTES, dtype=torch.uint8, device=gpu)
            address = stale.data_ptr()
            torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s
            stale.fill_(7)
            del stale
            destination = torch.empty(NUM_BYTES, dtype=torch.uint8, device=gpu)
            assert destination.data_ptr() == address
            stager.read([ReadJob(tmp_path / "bytes", 0, NUM_BYTES, destination)])
            assert torch.equal(destination.cpu(), wanted)
            del destination
