"""Groups that were broken off: nothing that came out of them counts, whatever it looks like."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_trainer import train
from qlora_trainer.control import WorkerEnv
from qlora_trainer.data import Sequences
from qlora_trainer.errors import LostPeer, MembersChange
from qlora_trainer.group import Group, process_group
from qlora_trainer.report import History
from qlora_trainer.samples import SampleSet


def test_the_result_of_a_group_that_was_broken_off_is_refused() -> None:
    group = Group()
    group.require_whole()
    group.broken_off.set()
    with pytest.raises(LostPeer):
        group.require_whole()


def test_whatever_comes_of_it_is_a_lost_peer(env: WorkerEnv) -> None:
    with pytest.raises(LostPeer, match="garbage"), process_group(env) as group:
        group.broken_off.set()
        raise ValueError("garbage")


@pytest.mark.parametrize("error", [ValueError("own"), MembersChange("after step 3")])
def test_other_errors_stay_what_they_are(env: WorkerEnv, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), process_group(env):
        raise error


def test_an_evaluation_that_was_broken_off_is_not_kept(env: WorkerEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    group, model = Group(), SimpleNamespace(eval=lambda: None, train=lambda: None)
    data = SimpleNamespace(
        eval_sequences=Sequences(np.arange(3), np.arange(4), np.ones(3, np.int64)),
        eval_samples=SampleSet.of_lists([([i, i], [1, 1]) for i in range(3)]),
        plan=SimpleNamespace(micro_batch_size=1),
    )
    optimizer = SimpleNamespace(keep_best=lambda: None)
    session: Any = SimpleNamespace(env=env, data=data, model=model, optimizer=optimizer, group=group, snapshots=None)
    position: Any = SimpleNamespace(step=2, history=History())
    reporter: Any = SimpleNamespace(alive=lambda: None, evaluated=lambda *_: None, work=None)

    def losses(_session: Any, _clock: Any, micro: Any, *_: Any) -> torch.Tensor:
        if micro.index == breaks_at:
            group.broken_off.set()  # whatever it is, it came through collectives that did not end
        return torch.tensor([[1.5, 0.0]])

    monkeypatch.setattr(train, "_losses", losses)
    breaks_at = 2
    with pytest.raises(LostPeer):
        train._evaluate(session, position, reporter)
    assert not position.history.evaluations
    group.broken_off.clear()
    breaks_at = -1
    train._evaluate(session, position, reporter)
    assert position.history.evaluations == [(2, 1.5)]
    assert position.history.by_length == [(2, {2: 1.5})]
