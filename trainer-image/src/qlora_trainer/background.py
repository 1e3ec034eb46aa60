"""Threads that a process does not wait for when it ends: what they do may hang in a store or on a rank that is gone."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from qlora_trainer.errors import StorageError

P = ParamSpec("P")
T = TypeVar("T")


def in_daemon(job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
    """As an executor's submit, but the process may end without it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(job(*args, **kwargs))
        except BaseException as error:  # as an executor does; torch's CheckpointException is no Exception
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(job, "__name__", "job"), daemon=True).start()
    return future


def answer_of(question: "Future[T]", patience: float | None) -> T:
    """What a store says, waited for so many seconds (None: until it says something). StorageError when it is late."""
    try:
        return question.result(patience)
    except TimeoutError as error:
        if question.done():
            return question.result()  # just now, or what the job itself raised
        raise StorageError(f"no answer within {patience} s") from error
