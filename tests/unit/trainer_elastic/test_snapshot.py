"""The memory tier: what was written is read back, and no moment of death leaves a wrong snapshot."""

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_trainer import snapshot
from qlora_trainer.errors import OutOfMemory
from qlora_trainer.snapshot import SnapshotSlots
from qlora_trainer.standing import Kept

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64]


def state_of(step: int) -> dict[str, torch.Tensor]:
    """A state from which the step can be read back, with odd sizes and several dtypes."""
    return {"a": torch.full((257, 33), float(step)), "b": torch.full((3,), step, dtype=torch.int64)}


def assert_is_step(found: snapshot.Snapshot | None) -> int:
    assert found is not None
    state, extra = found.view()
    expected = state_of(found.step)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert extra == {"tokens": found.step * 10}
    return found.step


def write(slots: SnapshotSlots, step: int) -> None:
    slots.write(step, 1, state_of(step), {"tokens": step * 10})
    slots.wait()


def test_empty(tmp_path: Path) -> None:
    assert SnapshotSlots(tmp_path).newest() is None
    assert snapshot.newest_step(tmp_path) is None


def test_the_newest_of_two_wins_and_the_process_does_not_matter(tmp_path: Path) -> None:
    slots = SnapshotSlots(tmp_path)
    for step in range(1, 6):
        write(slots, step)
        assert assert_is_step(slots.newest()) == step
    again = SnapshotSlots(tmp_path)
    assert assert_is_step(again.newest()) == 5
    write(again, 6)
    assert {header.step for path in tmp_path.iterdir() if (header := snapshot.read_header(path))} == {5, 6}
    assert snapshot.newest_step(tmp_path) == 6


def test_the_state_may_change_after_wait(tmp_path: Path) -> None:
    slots, tensor = SnapshotSlots(tmp_path), torch.zeros(1_000_000)
    for step in range(1, 4):
        tensor.fill_(step)
        slots.write(step, 1, {"t": tensor}, {})
        slots.wait()
        tensor.fill_(-1)
    newest = slots.newest()
    assert newest is not None and torch.equal(newest.view()[0]["t"], torch.full((1_000_000,), 3.0))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_state_comes_back_bit_equal(tmp_path: Path, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5))
    state = {}
    for index, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from(DTYPES))
        state[f"t{index}"] = (torch.randn(shape) * 100).to(dtype)
    extra = data.draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=2000), max_size=3))
    slots = SnapshotSlots(tmp_path)
    slots.write(10**6, 3, state, extra)
    found = SnapshotSlots(tmp_path).newest() if slots.wait() is None else None
    assert found is not None and (found.step, found.generation) == (10**6, 3)
    loaded, loaded_extra = found.view()
    assert loaded_extra == extra
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    for path in tmp_path.iterdir():
        path.unlink()


def damaged_newest_of_two(folder: Path) -> tuple[Path, bytearray]:
    """Steps 1 and 2 are written, a bit of the newer one's payload is flipped: its path and bytes."""
    slots = SnapshotSlots(folder)
    write(slots, 1)
    write(slots, 2)
    newest = slots.newest()
    assert newest is not None
    raw = bytearray(newest.path.read_bytes())
    raw[-5] ^= 1
    newest.path.write_bytes(raw)
    return newest.path, raw


def test_a_damaged_slot_is_never_chosen(tmp_path: Path) -> None:
    path, raw = damaged_newest_of_two(tmp_path)
    assert assert_is_step(SnapshotSlots(tmp_path).newest()) == 1
    path.write_bytes(raw[: len(raw) // 2])
    assert assert_is_step(SnapshotSlots(tmp_path).newest()) == 1


def test_only_the_newest_is_verified_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, verified = SnapshotSlots(tmp_path), []
    write(slots, 1)
    write(slots, 2)
    verify = snapshot._verify
    monkeypatch.setattr(snapshot, "_verify", lambda path, *slot: verified.append(path) or verify(path, *slot))
    again = SnapshotSlots(tmp_path)
    newest = again.newest()
    write(again, 3)
    assert newest is not None and verified == [newest.path]
    assert {header.step for path in tmp_path.iterdir() if (header := snapshot.read_header(path))} == {2, 3}


@pytest.mark.parametrize("looks", [True, False])
def test_a_damaged_slot_is_the_next_that_is_written(tmp_path: Path, looks: bool) -> None:
    damaged_newest_of_two(tmp_path)
    again = SnapshotSlots(tmp_path)
    if looks:
        assert assert_is_step(again.newest()) == 1
    again.write(3, 1, {"a": torch.empty(3, device="meta")}, {})
    with pytest.raises(NotImplementedError):
        again.wait()  # half written
    assert assert_is_step(again.newest()) == 1, "the intact one was not given up"
    write(again, 4)
    assert {header.step for path in tmp_path.iterdir() if (header := snapshot.read_header(path))} == {1, 4}


def test_a_full_volume_is_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    slots = SnapshotSlots(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    slots.write(1, 1, state_of(1), {})
    with pytest.raises(OutOfMemory, match=r"No space left.* MiB for two snapshots: raise resourcesPerNode"):
        slots.wait()
    slots.write(1, 1, state_of(1), {})
    Kept(snapshots=slots).settle()


def test_an_error_while_writing_is_raised_and_the_step_before_stays(tmp_path: Path) -> None:
    slots = SnapshotSlots(tmp_path)
    write(slots, 1)
    slots.write(2, 1, state_of(2), {"not json": object()})
    with pytest.raises(TypeError):
        slots.wait()
    assert assert_is_step(slots.newest()) == 1


def _in_child(work: Any) -> int:
    """Fork, run `work`, return the wait status; the child never returns into pytest."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_killed_at_every_line(tmp_path: Path) -> None:
    """SIGKILL before every single line that writing a snapshot executes: step 2 or step 1 is there, intact."""
    lines_file = snapshot.__file__

    def die_at(line_number: int, run_dir: Path) -> None:
        slots = SnapshotSlots(run_dir)
        write(slots, 1)
        left = line_number

        def trace(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename == lines_file and event == "line":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        threading.settrace(trace)
        slots._thread = type(slots._thread)(max_workers=1)  # a thread that is born traced
        write(slots, 2)

    outcomes = []
    for line in range(2000):
        run_dir = tmp_path / str(line)
        status = _in_child(lambda line=line, run_dir=run_dir: die_at(line, run_dir))
        outcomes.append(assert_is_step(SnapshotSlots(run_dir).newest()))
        if not os.WIFSIGNALED(status):
            break
    else:
        pytest.fail("the child never got through")
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert len(outcomes) > 50


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A writer in a tight loop, killed anywhere: at most the write under way is lost, whatever was acknowledged."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, acknowledged = random.Random(seed), tmp_path / "acknowledged"
    acknowledged.write_text("0")

    def loop() -> None:
        slots = SnapshotSlots(tmp_path / "run")
        found = slots.newest()
        step = found.step if found else 0
        with acknowledged.open("r+") as file:
            while True:
                os.pwrite(file.fileno(), str(step).encode(), 0)
                step += 1
                write(slots, step)

    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            try:
                loop()
            finally:
                os._exit(1)
        time.sleep(0.01 + chance.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done = int(acknowledged.read_text())
        newest = SnapshotSlots(tmp_path / "run").newest()
        if done:
            assert assert_is_step(newest) in (done, done + 1)
    assert done > 40
