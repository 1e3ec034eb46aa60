"""How much of this machine's memory is in use at most, sampled once a second."""

import threading

import psutil

_PERIOD = 1.0  # seconds


class MemoryMeter:
    """Peak of total - available memory while the context is open; everything on the machine counts."""

    def __init__(self) -> None:
        self.peak_gib = 0.0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "MemoryMeter":
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sampler.join()

    def _sample(self) -> None:
        while not self._over.wait(_PERIOD):
            self.peak_gib = max(self.peak_gib, used_gib())


def used_gib() -> float:
    """Memory in use right now, GiB."""
    memory = psutil.virtual_memory()
    return (memory.total - memory.available) / (1 << 30)
