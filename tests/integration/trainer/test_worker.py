"""Worker processes over gloo, from file:// sources to a file:// bucket: one world, changing worlds, broken worlds."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_api.run import Command, ExitCode, TrainConfig
from qlora_trainer import control, session, storage
from qlora_trainer.checkpoint import find_complete
from qlora_trainer.control import Control, Phase, WorkerEnv
from qlora_trainer.peers import ENV_PEERS
from qlora_trainer.storage import FileStore
from qlora_trainer.train import work

MakeWorld = Callable[..., Any]
NO_EVAL = {"evalFraction": 0.0}


def bucket(world: Any) -> FileStore:
    return FileStore(world.root / "bucket" / "run-01234567")


def order(world: Any) -> dict[int, list[list[int]]]:
    """step -> samples of its micro batches in order; every repetition of a step must have been the same."""
    steps: dict[int, dict[int, list[int]]] = {}
    for line in world.traces():
        known = steps.setdefault(line["step"], {}).setdefault(line["micro"], line["samples"])
        assert known == line["samples"], f"step {line['step']} saw other samples when it was repeated"
    return {step: [micros[index] for index in sorted(micros)] for step, micros in sorted(steps.items())}


def test_two_ranks_train_and_publish(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.run([0, 1]) == [0, 0]
    for pod in (0, 1):
        state = world.state(pod)
        assert state.phase == Phase.FINISHED and state.progress.step == 6 and state.snapshot_step == 6
        assert state.artifacts.eval_loss_after < state.artifacts.eval_loss_before - 0.1
    keys = {entry.key: entry.size for entry in bucket(world).list()}
    manifest = json.loads((world.root / "bucket/run-01234567/manifest.json").read_text())
    assert {f["name"]: f["size"] for f in manifest["files"]} == {k: v for k, v in keys.items() if k[:8] == "adapter/"}
    assert {f"adapter/gen-00001/{name}" for name in ("README.md", "loss.png", "adapter_config.json")} <= keys.keys()
    assert manifest["provenance"]["spec"]["lora"]["r"] == 4 and manifest["provenance"]["model_digest"]
    assert [m.step for m in find_complete(bucket(world))] == [6, 4]
    assert world.run([0]) == [0], "a finished run is not trained again"
    assert world.state(0).artifacts == state.artifacts


def work_with_fsdp2(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker whose base FSDP2 gathers, as where ranks are on several hosts."""
    os.environ[ENV_PEERS] = "0"
    work(config, env)


@pytest.mark.parametrize("entry", [work, work_with_fsdp2])
def test_every_measure_arrives(make_world: MakeWorld, entry: Any) -> None:
    """At the agent and in the run's report: all that docs/metrics.md lists for a worker on a CPU."""
    world = make_world()
    world.entry = entry
    assert world.run([0, 1]) == [0, 0]
    state = world.state(0)
    told = json.loads((world.adapter_folder() / "metrics.json").read_text())
    card = (world.adapter_folder() / "README.md").read_text()
    table = (Path(__file__).parents[3] / "docs/metrics.md").read_text().partition("\n## ")[0]
    names = re.findall(r"^\| `([a-z_]+)`", table, re.MULTILINE)
    not_here = {"step_work_seconds", "mfu", "rendezvous_seconds", "restart_seconds"}  # ten steps, a GPU, an agent
    measured = [name for name in names if name not in not_here and "gpu" not in name]
    assert len(measured) > 10
    for name in measured:
        assert state.metrics[name] == pytest.approx(told[name], abs=1e-3), name
        assert f"| {name.replace('_', ' ')} | {told[name]} |" in card
    assert all(state.metrics[name] > 0 for name in ("data_wait_seconds", "gather_wait_seconds", "flops_per_second"))
    assert state.plan.sharding == "FULL_SHARD" and state.plan.micro_batch_size == 1
    by_length = {name: loss for name, loss in told.items() if name.startswith("eval_loss_to_")}
    assert by_length and by_length.items() <= state.metrics.items()
    assert min(by_length.values()) <= told["eval_loss_after"] <= max(by_length.values())


def work_on_a_small_gpu(config: TrainConfig, env: WorkerEnv) -> None:
    """A worker whose device has 64 MiB."""
    session.smallest_gpu = lambda *_: 64 << 20
    work(config, env)


def test_a_run_that_fits_nowhere_ends_before_anything_is_quantized(make_world: MakeWorld) -> None:
    world = make_world(elasticPolicy={"minNodes": 1, "maxNodes": 3})
    world.entry = work_on_a_small_gpu
    assert world.run([0]) == [ExitCode.BAD_CONFIG]
    says = world.termination(0).message
    assert says.startswith("even on maxNodes (3) x numProcPerNode (1) GPUs the run needs ")
    assert "lower training.maxLength" in says
    assert not (world.root / "cache" / "packed").exists()


@pytest.fixture
def straight(make_world: MakeWorld) -> Any:
    """Six steps on two ranks without a break."""
    world = make_world("straight", dataset=NO_EVAL)
    assert world.run([0, 1]) == [0, 0]
    return world


def walk(world: Any, pods_of_steps: list[list[int]]) -> None:
    """One step in each of these worlds, stopped at its boundary."""
    for pods in pods_of_steps:
        assert world.run(pods, Command.STOP) == [ExitCode.STOPPED] * len(pods)
        told = [world.state(pod) for pod in pods]
        assert all(state.checkpoint.step == state.progress.step for state in told), "the operator shows it"


def test_a_walk_through_world_sizes(make_world: MakeWorld, straight: Any) -> None:
    """2-1-3-2: each sample once, in the same order, and the same adapter within float tolerance."""
    world = make_world("walk", dataset=NO_EVAL)
    walk(world, [[0, 1], [0], [0, 1, 2], [1, 2]])
    assert world.run([0, 1]) == [0, 0]
    assert order(world) == order(straight)
    seen = [line["step"] for line in world.traces()]
    assert len(seen) == 6 * 6, "no step was done twice"
    for name, tensor in straight.adapter().items():
        torch.testing.assert_close(world.adapter()[name], tensor, rtol=1e-3, atol=1e-5)


def test_restarts_at_equal_size_are_bit_equal(make_world: MakeWorld, straight: Any) -> None:
    """From memory snapshots, and from the bucket by pods that have none."""
    world = make_world("restarts", dataset=NO_EVAL)
    walk(world, [[0, 1], [0, 1]])
    walk(world, [[2, 3]])
    assert world.run([2, 4]) == [0, 0]
    assert all(torch.equal(world.adapter()[name], tensor) for name, tensor in straight.adapter().items())


def test_killed_in_the_middle(make_world: MakeWorld, straight: Any) -> None:
    """SIGKILL for one of two; the survivor goes on alone from its snapshot and loses at most one step."""
    world = make_world("killed", dataset=NO_EVAL)
    world.start([0, 1])
    while not ((state := world.state(1)) and state.progress.step >= 2):
        assert all(process.is_alive() for process in world.processes)
        time.sleep(0.01)
    world.processes[1].kill()
    assert world.wait()[0] == ExitCode.LOST_PEER
    reached = world.state(0).progress.step
    assert world.run([0]) == [0]
    assert order(world) == order(straight)
    resumed = min(line["step"] for line in world.traces() if line["generation"] == 2)
    assert resumed >= reached - 1
    for name, tensor in straight.adapter().items():
        torch.testing.assert_close(world.adapter()[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_survivor_goes_on_in_its_process(make_world: MakeWorld, straight: Any) -> None:
    """Where the agent gives out places, a worker that lost its peer keeps its model and takes its state anew."""
    world = make_world("survivor", dataset=NO_EVAL)
    world.start([0, 1])
    world.until(lambda: world.state(1) and world.state(1).progress.step >= 2, "step 2")
    world.tell(0, generation=1)
    world.processes[1].kill()
    world.until(lambda: world.has_parked(0), "parking")
    assert world.termination(0).exit_code == ExitCode.LOST_PEER, "the operator wants to know"
    reached = world.state(0).progress.step
    world.place([0])
    assert world.wait()[0] == ExitCode.OK
    assert order(world) == order(straight)
    assert min(line["step"] for line in world.traces() if line["generation"] == 2) >= reached - 1
    for name, tensor in straight.adapter().items():
        torch.testing.assert_close(world.adapter()[name], tensor, rtol=1e-3, atol=1e-5)


def work_with_a_bucket_that_may_hang(config: TrainConfig, env: WorkerEnv) -> None:
    """As `work`; no call of the store comes back while the file `hangs` is there."""

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            while (env.run_dir.parent / "hangs").exists():
                time.sleep(0.05)
            return function(*args, **kwargs)

        return call

    for name in ("list", "get", "put"):
        setattr(storage.FileStore, name, slow(getattr(storage.FileStore, name)))
    work(config, env)


def test_nobody_waits_for_a_bucket_that_hangs_while_there_are_snapshots(make_world: MakeWorld, straight: Any) -> None:
    world = make_world("hanging", dataset=NO_EVAL, checkpoint={"intervalSteps": 1000})
    world.entry = work_with_a_bucket_that_may_hang
    world.start([0, 1])
    world.until(lambda: world.state(1) and world.state(1).progress.step >= 2, "step 2")
    world.tell(0, generation=1)
    (world.root / "hangs").touch()
    world.processes[1].kill()
    world.until(lambda: world.has_parked(0), "parking")
    reached = world.state(0).progress.step
    world.place([0])
    world.until(lambda: world.state(0).generation == 2 and world.state(0).progress.step > reached, "a new step", 30)
    (world.root / "hangs").unlink()
    assert world.wait()[0] == ExitCode.OK
    assert order(world) == order(straight)


def test_a_survivor_goes_alone_and_takes_a_newcomer_in(make_world: MakeWorld, straight: Any) -> None:
    """2-1-2 with one process that stays: its base is sharded, whole and sharded again, its steps are nobody else's."""
    world = make_world("regrown", dataset=NO_EVAL)
    world.start([0, 1])
    world.until(lambda: world.state(1) and world.state(1).progress.step >= 1, "step 1")
    world.tell(0, generation=1)
    world.processes.pop().kill()
    world.until(lambda: world.has_parked(0), "parking")
    world.rehearse(1)
    world.place([0], prepare=3)  # one step alone
    world.until(lambda: world.has_parked(0) and world.state(0).generation == 2, "parking after a step alone")
    world.place([0, 1])
    assert world.wait() == [ExitCode.OK, ExitCode.OK]
    assert order(world) == order(straight)
    assert {line["generation"] for line in world.traces()} == {1, 2, 3}
    for name, tensor in straight.adapter().items():
        torch.testing.assert_close(world.adapter()[name], tensor, rtol=1e-3, atol=1e-5)


def test_prepare_parks_all_at_one_step(make_world: MakeWorld) -> None:
    """One agent's wish parks every rank at the same boundary, with snapshots of it."""
    world = make_world("parked", training={"maxSteps": 1000}, dataset=NO_EVAL)
    world.start([0, 1])
    world.until(lambda: world.state(0) and world.state(0).progress.step >= 2, "step 2")
    control.write_control(world.env(1).run_dir, Control(generation=1, prepare=2))
    while not all((state := world.state(pod)) and state.phase == Phase.PARKED for pod in (0, 1)):
        assert all(process.is_alive() for process in world.processes)
        time.sleep(0.01)
    steps = {world.state(pod).progress.step for pod in (0, 1)}
    assert steps == {world.state(pod).snapshot_step for pod in (0, 1)} and len(steps) == 1
    world.kill()


@pytest.mark.parametrize(
    "lora", [{"dropout": 0.3}, {"freezeA": True}, {"loraPlusRatio": 16.0, "dropout": 0.1}, {"useDora": True}], ids=str
)
def test_switches_do_not_know_the_world_size(make_world: MakeWorld, lora: dict[str, Any]) -> None:
    """Dropout masks, frozen halves and rates of their own: two ranks do what one does."""
    one, two = (make_world(name, lora=lora, dataset=NO_EVAL, training={"maxSteps": 3}) for name in ("one", "two"))
    assert one.run([0]) == [0] and two.run([0, 1]) == [0, 0]
    assert one.adapter().keys() == two.adapter().keys()
    for name, tensor in one.adapter().items():
        torch.testing.assert_close(two.adapter()[name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))


def chat(folder: Path) -> dict[str, Any]:
    """Where conversations for training and evaluation lie, as arguments of make_world."""

    def conversation(i: int) -> dict[str, Any]:
        turns = [("user", f"row {i}"), ("assistant", "the quick brown fox"), ("user", "why"), ("assistant", "lazy dog")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    for name, rows in (("train", range(24)), ("eval", range(100, 106))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in rows))
    dataset = {"trainOn": "assistant", "evalFraction": 0.0, "evalUri": f"file://{folder}/eval.jsonl"}
    return {"data": folder / "train.jsonl", "dataset": dataset}


def test_conversations_an_evaluation_set_and_early_stopping(make_world: MakeWorld, tmp_path: Path) -> None:
    """Assistant turns alone count; the run ends when the evaluation has stopped to improve."""
    training = {"maxSteps": 200, "evalIntervalSteps": 2, "earlyStoppingPatience": 1, "learningRate": 0.3}
    world = make_world("chat", **chat(tmp_path), training={**training, "maxLength": 64})
    assert world.run([0, 1]) == [0, 0]
    state = world.state(0)
    assert state.progress.step < 200 and state.progress.step % 2 == 0
    history = json.loads((world.adapter_folder() / "metrics.json").read_text())["history"]
    losses = [loss for _, loss in history["evaluations"]]
    assert losses[-1] >= min(losses[:-1]) and losses == sorted(losses[:-1], reverse=True) + losses[-1:]


def test_early_stopping_publishes_the_best_adapter(make_world: MakeWorld, tmp_path: Path) -> None:
    """The same as a run that ends at the best evaluation; also when killed after it and resumed elsewhere."""
    training = {"evalIntervalSteps": 2, "learningRate": 0.3, "lrScheduler": "constant", "maxLength": 64}
    stopping = {**training, "maxSteps": 200, "earlyStoppingPatience": 3}
    straight, killed = (make_world(name, **chat(tmp_path), training=stopping) for name in ("straight", "killed"))
    assert straight.run([0]) == [0]
    metrics = json.loads((straight.adapter_folder() / "metrics.json").read_text())
    best, loss = min(metrics["history"]["evaluations"][1:], key=lambda evaluation: evaluation[1])
    assert (metrics["published_step"], metrics["eval_loss_after"]) == (best, loss)
    assert metrics["steps"] == best + 6
    short = make_world("short", **chat(tmp_path), training={**training, "maxSteps": best})
    assert short.run([0]) == [0]
    killed.start([0])
    while not ((state := killed.state(0)) and state.progress.step > best):
        assert killed.processes[0].is_alive()
        time.sleep(0.001)
    killed.kill()
    assert killed.run([0], Command.STOP) == [ExitCode.STOPPED]  # from the snapshot; then from the bucket
    assert killed.run([1]) == [0]
    for world in (straight, killed):
        assert all(torch.equal(world.adapter()[name], tensor) for name, tensor in short.adapter().items())
    state = killed.state(1)
    assert state.artifacts.eval_loss_after == loss and state.progress.step == best + 6


@pytest.mark.parametrize(
    ("spec", "code", "says"),
    [
        ({"model": {"uri": "file:///nowhere"}}, ExitCode.BAD_MODEL, "does not exist"),
        ({"dataset": {"uri": "file:///nowhere.jsonl"}}, ExitCode.BAD_DATA, "does not exist"),
        ({"dataset": {"format": "messages"}}, ExitCode.BAD_DATA, "train.jsonl:1: `messages` is missing"),
        ({"training": {"optimizer": "adamw_8bit"}}, ExitCode.BAD_CONFIG, "use adamw"),
        ({"training": {"learningRate": 1e-50}}, ExitCode.BAD_ADAPTER, "unchanged"),
    ],
)
def test_bad_input_ends_with_its_code(make_world: MakeWorld, spec: dict[str, Any], code: ExitCode, says: str) -> None:
    world = make_world("bad", **spec)
    assert world.run([0]) == [code]
    assert says in world.termination(0).message


def test_a_damaged_base_is_not_trained_on(make_world: MakeWorld) -> None:
    world = make_world("damaged", dataset=NO_EVAL)
    walk(world, [[0, 1]])
    packed = next((world.root / "cache" / "packed").glob("*/layer-00001.bin"))
    content = bytearray(packed.read_bytes())
    content[len(content) // 3] ^= 4
    packed.write_bytes(content)
    assert ExitCode.CORRUPT_BASE in world.run([0, 1])
    assert world.run([0, 1]) == [0, 0], "the next start builds the damaged layer anew"
