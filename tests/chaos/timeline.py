"""When which step was done by which generation, and what every step consumed, seen from outside while it happens."""

import io
import itertools
import statistics
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.verify import Steps, read_lines

from qlora_trainer.control import Phase, read_worker_state


@dataclass(frozen=True)
class Fall:
    """What a change of generation cost."""

    steps_lost: int  # done, and to be done again
    pod_left: bool  # of the generation before


class Timeline:
    """Fed by one thread (`look`) and the status (`members`)."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[int, float]] = {}  # generation -> step -> when it was first seen done
        self._members: dict[int, frozenset[str]] = {}  # by uid
        self._strikes: list[float] = []
        self._traces: dict[tuple[int, int], io.TextIOWrapper] = {}  # open files survive their pod
        self._lock = threading.Lock()

    def look(self, run_dir: Path) -> None:
        """Read a pod's worker state and keep hold of its traces."""
        try:
            state = read_worker_state(run_dir, 0)
            traces = list(run_dir.glob("trace-*.jsonl"))
            for path in traces:
                self._keep(path)
        except OSError:
            return  # the pod is gone
        if state is not None and state.phase != Phase.STARTING:
            with self._lock:
                self._seen.setdefault(state.generation, {}).setdefault(state.progress.step, time.monotonic())

    def _keep(self, path: Path) -> None:
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in self._traces:
            self._traces[key] = path.open()

    def members(self, generation: int, uids: Iterable[str]) -> None:
        """What the status says."""
        with self._lock:
            self._members[generation] = frozenset(uids)

    def struck(self) -> None:
        """A fault was caused now."""
        with self._lock:
            self._strikes.append(time.monotonic())

    def newest_step(self) -> int:
        """The newest step that was seen done."""
        with self._lock:
            return max((max(times) for times in self._seen.values()), default=0)

    def steps(self) -> Steps:
        """What the newest generation of each step consumed."""
        return read_lines(line for file in self._traces.values() for line in file)

    def recoveries(self) -> list[float]:
        """Of each fault: seconds until a step was seen that nobody had done before it."""
        first, found = self._first_seen(), []
        for strike in self._strikes:
            done = max((step for step, moment in first.items() if moment <= strike), default=0)
            later = [moment for step, moment in first.items() if step > done]
            found += [min(later) - strike] if later else []
        return found

    def falls(self) -> list[Fall]:
        """Of each change of generation. Members that nobody saw count as left: no lost step is excused unseen."""
        with self._lock:
            ends = [(number, min(times), max(times)) for number, times in sorted(self._seen.items()) if number]
        falls = []
        for (before, _, newest), (after, first, _) in itertools.pairwise(ends):
            known = {before, after} <= self._members.keys()
            pod_left = not known or bool(self._members[before] & self._members[after])
            falls.append(Fall(max(0, newest - first), pod_left))
        return falls

    def stalled_seconds(self, begin: float, end: float, usual: float) -> float:
        """How long steps did not come as they usually do: of gaps above three usual ones, what exceeds one."""
        seen = sorted(moment for moment in self._first_seen().values() if begin < moment < end)
        gaps = [later - earlier for earlier, later in itertools.pairwise([begin, *seen, end])]
        return sum(gap - usual for gap in gaps if gap > 3 * usual)

    def _first_seen(self) -> dict[int, float]:
        """When each step was first seen done."""
        first: dict[int, float] = {}
        with self._lock:
            for times in self._seen.values():
                for step, moment in times.items():
                    first[step] = min(moment, first.get(step, moment))
        return first

    def step_seconds(self) -> float | None:
        """Median time of a step."""
        gaps = [
            later - earlier
            for times in self._seen.values()
            for earlier, later in itertools.pairwise(sorted(times.values()))
        ]
        return statistics.median(gaps) if gaps else None

    def growths(self) -> list[tuple[float, int]]:
        """Of each time members were added with no fault near: (pause in seconds, a step's own time taken off; steps
        done twice)."""
        typical = self.step_seconds() or 0.0
        found = []
        ordered = sorted(number for number in self._seen if number)  # 0: a newcomer's rehearsal
        for before, after in itertools.pairwise(ordered):
            before_size, after_size = (len(self._members.get(number, ())) for number in (before, after))
            if after_size <= before_size or len(self._seen[after]) < 2:
                continue
            first, second = sorted(self._seen[after])[:2]
            last = max(self._seen[before])
            begin, end = self._seen[before][last], self._seen[after][second]
            if not any(begin - 5 < strike < end for strike in self._strikes):
                found.append((max(0.0, end - begin - typical), max(0, last - first)))
        return found
