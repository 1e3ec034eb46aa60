"""What a worker tells its agent between steps: that it moves, and that the run ends here."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_api.status import CheckpointStatus, Progress
from qlora_api.types import CheckpointSpec
from qlora_trainer import progress
from qlora_trainer.control import Control, WorkerEnv, WorkerState, read_worker_state, write_control
from qlora_trainer.progress import Reporter
from qlora_trainer.restore import Position
from qlora_trainer.workclock import Laps


def state(env: WorkerEnv) -> WorkerState:
    found = read_worker_state(env.run_dir, 0)
    assert found is not None
    return found


def test_signs_of_life_are_told_about_every_second(env: WorkerEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = Reporter(env)
    assert state(env).activity == 1
    told = []
    for _ in range(6):
        now[0] += 0.4
        reporter.alive()
        told.append(state(env).activity)
    assert told == [1, 1, 2, 2, 2, 3]


def test_a_run_that_stops_early_says_that_no_step_follows(env: WorkerEnv) -> None:
    reporter = Reporter(env)
    reporter._state = reporter._state.model_copy(update={"progress": Progress(step=12, total_steps=200, loss=1.0)})
    reporter.publishing()
    told = state(env).progress
    assert (told.step, told.total_steps, told.eta_seconds, told.loss) == (12, 12, 0, 1.0)


def test_the_agents_measures_are_in_the_report(env: WorkerEnv) -> None:
    write_control(env.run_dir, Control(generation=1, metrics={"restart_seconds": 2.5}))
    assert Reporter(env).measured() == {"restart_seconds": 2.5}


def session(env: WorkerEnv, found: CheckpointStatus | None = None, **spec: Any) -> Any:
    """As much of one as decides when a checkpoint is due."""
    checkpoints = SimpleNamespace(busy=False, newest=None, found=found)
    config = SimpleNamespace(spec=SimpleNamespace(checkpoint=CheckpointSpec(**spec)))
    return SimpleNamespace(env=env, config=config, checkpoints=checkpoints, is_first=False)


def found(step: int, age: float) -> CheckpointStatus:
    return CheckpointStatus(step=step, uri="s3://b/c", time=datetime.now(UTC) - timedelta(seconds=age))


@pytest.mark.parametrize(
    ("newest", "step", "due"),
    [(None, 8, False), (None, 9, True), (10, 18, False), (10, 19, True), (20, 34, True), (20, 26, False)],
)
def test_a_checkpoint_by_steps_is_due_though_faults_ended_those_before(
    env: WorkerEnv, newest: int | None, step: int, due: bool
) -> None:
    here = session(env, found(newest, 0) if newest else None, interval_steps=10)
    reporter = Reporter(env)
    assert reporter.save_due(here, Position(step)) == due
    reporter.save_started(step, 0.0)
    assert not reporter.save_due(here, Position(step)) or (step + 1) % 10 == 0, "one that fails is not tried every step"


@pytest.mark.parametrize(
    ("age", "step", "due"),
    [(None, 0, False), (None, 5, True), (30, 5, False), (90, 5, True), (-90, 5, False)],
)
def test_a_checkpoint_by_time_is_due_though_the_worker_is_new(
    env: WorkerEnv, monkeypatch: pytest.MonkeyPatch, age: float | None, step: int, due: bool
) -> None:
    here = session(env, found(3, age) if age is not None else None, interval_seconds=60)
    reporter = Reporter(env)
    for told_elsewhere in ("_update", "_note_constants"):
        monkeypatch.setattr(reporter, told_elsewhere, lambda *_, **__: None)
    reporter.start(here, Position(step), Laps())
    assert reporter.save_due(here, Position(step)) == due
    reporter.save_started(step, 0.0)
    assert not reporter.save_due(here, Position(step))
