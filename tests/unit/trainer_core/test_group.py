"""Groups that were broken off: nothing that came out of them counts, whatever it looks like."""

import pytest

from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import LostPeer, MembersChange
from qlora_trainer.group import Group, process_group


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
