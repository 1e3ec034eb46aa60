"""What a worker tells its agent between steps: that it moves, and that the run ends here."""

import pytest

from qlora_api.status import Progress
from qlora_trainer import progress
from qlora_trainer.control import WorkerEnv, WorkerState, read_worker_state
from qlora_trainer.progress import Reporter


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
