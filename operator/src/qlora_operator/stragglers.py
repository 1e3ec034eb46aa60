"""Which pods are slower than the others, from how long each works for a step. Pure; it only tells, nothing acts on it.

All ranks wait for the slowest in a step's all-reduce, so a step's duration says nothing about who is slow; each worker
measures its own part up to there and reports the median of its last steps. Every rank does the same number of micro
batches in a step (dummies fill up), so the parts compare as they are.

Rules: a pod is a straggler when its part takes RATIO times the median of the others' and costs LEAST_SECONDS a step;
it stays one until it is below RECOVERED_RATIO or RECOVERED_SECONDS, so that one at the edge is told once; while there
is no measure (the workers have just started) nothing changes; who left the generation is none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from qlora_api.status import Straggler

RATIO, RECOVERED_RATIO = 1.5, 1.25
LEAST_SECONDS, RECOVERED_SECONDS = 0.05, 0.025  # below, a step waits for a loaded host's scheduler, not for a node
_WORTH_TELLING = 1.25  # a known straggler's ratio is written anew when it changed by this factor


@dataclass(frozen=True)
class Part:
    """A member and the median seconds that it works for a step; None: not measured yet."""

    pod_name: str
    node_name: str
    seconds: float | None


def find(known: Iterable[Straggler], parts: tuple[Part, ...], now: datetime) -> list[Straggler]:
    """The stragglers from now on, by rank."""
    before = {straggler.pod_name: straggler for straggler in known}
    found = (_judge(before.get(part.pod_name), part, parts, now) for part in parts)
    return [straggler for straggler in found if straggler is not None] if len(parts) > 1 else []


def _judge(was: Straggler | None, part: Part, parts: tuple[Part, ...], now: datetime) -> Straggler | None:
    others = [other.seconds for other in parts if other is not part and other.seconds is not None]
    if part.seconds is None or not others:
        return was
    usual = median(others)
    limit, least = (RATIO, LEAST_SECONDS) if was is None else (RECOVERED_RATIO, RECOVERED_SECONDS)
    if part.seconds <= limit * usual or part.seconds - usual < least:
        return None
    ratio = part.seconds / max(usual, 1e-9)
    if was is not None and was.ratio / _WORTH_TELLING < ratio < was.ratio * _WORTH_TELLING:
        return was
    return Straggler(
        pod_name=part.pod_name,
        node_name=part.node_name,
        ratio=ratio,
        work_seconds=part.seconds,
        since=now if was is None else was.since,
    )
