"""Files to tensors in pieces and back: any boundary, several callers, short files, errors; safetensors' layout."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import BadModel
from qlora_trainer.staging import ReadJob, Stager, finish, read_into, write_tensor
from qlora_trainer.weights import Weights, read_header, read_tensors, write_safetensors

CPU = torch.device("cpu")
BYTES = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staging") / "bytes"
    path.write_bytes(BYTES.numpy().tobytes())
    return path


ranges = st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(sorted)


@settings(max_examples=40, deadline=None)
@given(wanted=st.lists(ranges, max_size=5), chunk=st.sampled_from([1, 7, 256, 1000, 4999, 5000, 5001]))
def test_any_range_in_any_pieces(wanted, chunk, file):
    if chunk == 1:
        wanted = [(start, min(stop, start + 50)) for start, stop in wanted]
    destinations = [torch.zeros(stop - start, dtype=torch.uint8) for start, stop in wanted]
    with Stager(CPU, 3, chunk) as stager:
        stager.read(ReadJob(file, a, b - a, to) for (a, b), to in zip(wanted, destinations, strict=True))
    assert all(torch.equal(to, BYTES[a:b]) for (a, b), to in zip(wanted, destinations, strict=True))


def test_several_callers_share_the_lanes(file):
    with Stager(CPU, 2, 100) as stager, ThreadPoolExecutor(4) as pool:

        def read(start: int) -> bool:
            to = torch.empty(3000, dtype=torch.uint8)
            stager.read([ReadJob(file, start, 3000, to)])
            return torch.equal(to, BYTES[start : start + 3000])

        assert all(pool.map(read, range(0, 2000, 50)))


def test_a_short_file_says_what_to_do(file):
    with pytest.raises(BadModel, match=r"ends at byte 5000, its index names 5001\. Delete it"):
        read_into([ReadJob(file, 4000, 1001, torch.empty(1001, dtype=torch.uint8))], CPU)
    with pytest.raises(BadModel, match="ends at byte"):
        read_into([ReadJob(file, 6000, 10, torch.empty(10, dtype=torch.uint8))], CPU)


def test_an_error_ends_the_reading_and_leaves_the_stager_usable(file, tmp_path):
    to = torch.empty(5000, dtype=torch.uint8)
    with Stager(CPU, 2, 10) as stager:
        with pytest.raises(FileNotFoundError):
            stager.read([ReadJob(file, 0, 5000, to), ReadJob(tmp_path / "gone", 0, 10, to[:10])])
        with pytest.raises(BadModel):
            stager.read([ReadJob(file, 4999, 100, to[:100]), ReadJob(file, 0, 5000, to)])
        with pytest.raises(IsADirectoryError):
            stager.read([ReadJob(tmp_path, 0, 10, to[:10])])
        stager.read([ReadJob(file, 0, 5000, to)])
    assert torch.equal(to, BYTES)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("staging")]


def test_a_failed_task_drops_those_that_have_not_begun():
    futures: list[Future[None]] = []
    submitted, done = threading.Event(), []

    def fail() -> None:
        submitted.wait()
        raise OSError("first")

    def work() -> None:  # under way when the other fails: waited for
        submitted.wait()
        while not futures[-1].cancelled():
            time.sleep(0.001)
        done.append("work")

    with ThreadPoolExecutor(2) as pool:
        futures += [pool.submit(task) for task in (work, fail, work, lambda: done.append("never"))]
        submitted.set()
        with pytest.raises(OSError, match="first"):
            finish(futures)
        assert futures[0].done() and "never" not in done and "work" in done


@pytest.mark.parametrize("chunk", [8, 100, 1 << 20])
def test_a_tensor_is_written_in_pieces_and_converted(chunk, tmp_path):
    values = torch.linspace(-3, 3, 77).view(7, 11)
    with open(tmp_path / "out", "wb") as out:
        write_tensor(out, values, torch.bfloat16, chunk)
        write_tensor(out, BYTES, torch.uint8, chunk)
    content = (tmp_path / "out").read_bytes()
    assert content[:154] == values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert content[154:] == BYTES.numpy().tobytes()


def test_safetensors_are_written_and_read_as_the_library_does(tmp_path):
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "f32": torch.randn(7, generator=generator),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "bytes": BYTES,
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", [(name, tensor, tensor.dtype) for name, tensor in tensors.items()])
    with Stager(CPU, 2, 64) as stager:
        for path in (tmp_path / "theirs", tmp_path / "ours"):
            for found in (read_tensors(read_header(path), stager), load_file(path)):
                assert found.keys() == tensors.keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_unknown_types_are_refused_by_name(tmp_path):
    header = b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(BadModel, match=r"w is of type F4: convert"):
        read_header(tmp_path / "model.safetensors")


def test_weights_are_the_same_mapped_and_staged_and_know_their_aliases(tmp_path):
    tensors = {"model.layers.0.w": torch.randn(9, 4), "lm_head.weight": torch.randn(3, 4).half()}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    with Stager(CPU, 2, 16) as stager:
        for name in ("model.layers.0.w", "layers.0.w", "base.model.layers.0.w", "lm_head.weight"):
            assert name in weights
            expected = tensors[name if name in tensors else "model.layers.0.w"]
            assert torch.equal(weights.get(name), expected)
            assert torch.equal(weights.get(name, stager), expected)
        assert "w" not in weights
        with pytest.raises(BadModel, match="lack w"):
            weights.get("w", stager)
