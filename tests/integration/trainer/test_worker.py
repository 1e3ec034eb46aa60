"""Worker processes over gloo, from file:// sources to a file:// bucket."""

from pathlib import Path

from qlora_trainer.control import Phase
from qlora_trainer.storage import FileStore


def test_two_ranks_train_and_publish(world, tmp_path: Path) -> None:
    assert world.run([0, 1]) == [0, 0]
    for pod in (0, 1):
        state = world.state(pod)
        assert state.phase == Phase.FINISHED and state.progress.step == 6
        assert state.artifacts.eval_loss_after < state.artifacts.eval_loss_before
    keys = [entry.key for entry in FileStore(tmp_path / "bucket").list()]
    print(keys, state)
