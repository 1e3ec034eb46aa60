"""A GPU that has too little memory ends a run that has not trained, and only its own pod where others have."""

from collections.abc import Callable
from typing import Any

from qlora_api.run import Command, ExitCode, TrainConfig
from qlora_trainer import session
from qlora_trainer.control import WorkerEnv
from qlora_trainer.session import make_ready
from qlora_trainer.train import end_process, guarded, work


def shrink_gpu() -> None:
    """This process finds a device of 64 MiB."""
    session.smallest_gpu = lambda *_: 64 << 20


def work_on_a_small_gpu(config: TrainConfig, env: WorkerEnv) -> None:
    shrink_gpu()
    work(config, env)


def warm_on_a_small_gpu(config: TrainConfig, env: WorkerEnv) -> None:
    shrink_gpu()
    end_process(guarded(make_ready, config, env))


def test_a_run_that_fits_nowhere_ends_before_anything_is_quantized(make_world: Callable[..., Any]) -> None:
    world = make_world(elasticPolicy={"minNodes": 1, "maxNodes": 3})
    world.entry = work_on_a_small_gpu
    assert world.run([0]) == [ExitCode.BAD_CONFIG]
    says = world.termination(0).message
    assert says.startswith("even on maxNodes (3) x numProcPerNode (1) GPUs the run needs ")
    assert "lower training.maxLength" in says
    assert not (world.root / "cache" / "packed").exists()


def test_a_newcomer_that_is_too_small_does_not_end_the_run_of_the_others(make_world: Callable[..., Any]) -> None:
    world = make_world(dataset={"evalFraction": 0.0}, elasticPolicy={"minNodes": 1, "maxNodes": 3})
    world.entry = warm_on_a_small_gpu
    assert world.run([0]) == [ExitCode.BAD_CONFIG], "nobody has trained"
    world.entry = work
    assert world.run([0], Command.STOP) == [ExitCode.STOPPED]
    world.entry = warm_on_a_small_gpu
    assert world.run([1]) == [ExitCode.FAULTY_NODE]
    says = world.termination(1).message
    assert "the run has trained on other nodes, this one cannot join: even on maxNodes (3)" in says
