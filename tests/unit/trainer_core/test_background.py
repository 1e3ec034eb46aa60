"""Questions that nobody waits for longer than they are worth."""

import threading

import pytest

from qlora_trainer.background import answer_of, in_daemon
from qlora_trainer.errors import StorageError


def test_an_answer_that_is_late_is_a_store_s_fault_and_an_error_the_job_s_own() -> None:
    asked = threading.Event()
    late = in_daemon(asked.wait)
    with pytest.raises(StorageError, match="no answer within"):
        answer_of(late, 0.01)
    asked.set()
    assert answer_of(late, None)

    def times_out() -> None:
        raise TimeoutError("a file system that is away")

    for patience in (None, 5.0):
        with pytest.raises(TimeoutError, match="away"):
            answer_of(in_daemon(times_out), patience)
