"""What a grid of faults cost: one table by fault, one line of JSON, and whether every promise was kept."""

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.cells import Cell
from tests.chaos.cputimes import CpuTimes
from tests.chaos.driver import Driver, Outcome
from tests.chaos.verify import TOLERANCE, Comparison

MAX_LOST = 1
WORTH_TELLING = 5.0  # percent


@dataclass
class Report:
    """All runs together."""

    outcomes: list[Outcome] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    growths: list[tuple[float, int]] = field(default_factory=list)  # (pause in seconds, steps done twice)
    began: CpuTimes = field(default_factory=CpuTimes.now)

    def strike(self, driver: Driver, cells: list[Cell], last_step: int) -> list[Cell]:
        """Carry cells out while the run is before `last_step`; returns those it had no time for."""
        left = list(cells)
        while left and driver.step() < last_step:
            cell, before = left.pop(0), CpuTimes.now()
            try:
                outcome = driver.run(cell)
            except AssertionError as error:
                self.failed.append(f"{cell}: {error}")
                print(f"FAILED {cell}\n{error}", flush=True)
                return left
            self.outcomes.append(outcome)
            took = "no pause" if outcome.seconds is None else f"{outcome.seconds:5.2f} s"
            stolen = CpuTimes.now().stolen_percent(before)
            note = f"  ({stolen:.0f} % of the CPUs stolen)" if stolen >= WORTH_TELLING else ""
            print(f"{took}  lost {outcome.steps_lost}  step {driver.step():4d}  {cell}{note}", flush=True)
        return left

    def line(self, seed: int, seconds: float) -> dict[str, object]:
        """The last line of a grid."""
        times = [o.seconds for o in self.outcomes if o.seconds is not None]
        lost = [o.steps_lost for o in self.outcomes if not o.cell.lag_allowed]
        return {
            "cells": len(self.outcomes),
            "failed": len(self.failed),
            "max_steps_lost": max(lost, default=None),
            "max_steps_lost_all_pods_gone": max((o.steps_lost for o in self.outcomes if o.cell.lag_allowed), default=0),
            "wrong_samples": sum(c.wrong_samples for c in self.comparisons),
            "half_written": sum(c.half_written for c in self.comparisons),
            "adapters_differing": sum(c.adapter_distance > TOLERANCE for c in self.comparisons),
            **recovery(times),
            **self._growth(),
            "stolen_cpu_percent": CpuTimes.now().stolen_percent(self.began),
            "seed": seed,
            "seconds": round(seconds),
        }

    def _growth(self) -> dict[str, object]:
        if not self.growths:
            return {}
        pauses = [pause for pause, _ in self.growths]
        return {
            "growths": len(pauses),
            "grow_pause_p50_seconds": round(statistics.median(pauses), 2),
            "grow_pause_max_seconds": round(max(pauses), 2),
            "max_steps_lost_by_growth": max(lost for _, lost in self.growths),
        }

    def table(self) -> str:
        """Recovery by fault, those that spare somebody and those that do not apart."""
        groups = defaultdict[str, list[Outcome]](list)
        for outcome in self.outcomes:
            groups[outcome.cell.how + (", all" if outcome.cell.hits_all else "")].append(outcome)
        lines = [f"{'fault':<22} {'cells':>5} {'p50 s':>7} {'max s':>7} {'steps lost':>10}"]
        for how, outcomes in sorted(groups.items()):
            times = [o.seconds for o in outcomes if o.seconds is not None]
            middle, most = (f"{statistics.median(times):7.2f}", f"{max(times):7.2f}") if times else ("-", "-")
            worst = max(o.steps_lost for o in outcomes)
            lines.append(f"{how:<22} {len(outcomes):>5} {middle:>7} {most:>7} {worst:>10}")
        return "\n".join(lines)

    @property
    def is_good(self) -> bool:
        """Every promise was kept in every cell."""
        lost = all(o.cell.lag_allowed or o.steps_lost <= MAX_LOST for o in self.outcomes)
        same = all(not c.wrong_samples and not c.half_written for c in self.comparisons)
        close = all(c.adapter_distance <= TOLERANCE for c in self.comparisons)
        return bool(self.outcomes) and not self.failed and lost and same and close


def recovery(times: list[float]) -> dict[str, float | None]:
    """Middle and 99th percentile of seconds, as the last lines name them."""
    ordered = sorted(times)
    return {
        "recovery_p50_seconds": round(statistics.median(ordered), 2) if ordered else None,
        "recovery_p99_seconds": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2) if ordered else None,
    }


def carry_out(cells: list[Cell], cells_per_run: int, strike: Callable[[list[Cell]], list[Cell]]) -> None:
    """All cells, run after run; `strike` is one run and returns the cells that it had no time for."""
    left = list(cells)
    while left:
        group, left = left[:cells_per_run], left[cells_per_run:]
        left = strike(group) + left
