"""How much of this machine's CPUs its host gave to others: what was measured meanwhile says less about us."""

from dataclasses import dataclass
from pathlib import Path

_STOLEN = 7  # of proc(5): user nice system idle iowait irq softirq steal; guests are counted in user


@dataclass(frozen=True)
class CpuTimes:
    """Jiffies since boot, over all CPUs."""

    stolen: int
    total: int

    @classmethod
    def now(cls) -> "CpuTimes":
        return cls.parse(Path("/proc/stat").read_text())

    @classmethod
    def parse(cls, text: str) -> "CpuTimes":
        """From /proc/stat."""
        times = [int(word) for word in text.splitlines()[0].split()[1 : _STOLEN + 2]]
        return cls(times[_STOLEN], sum(times))

    def stolen_percent(self, before: "CpuTimes") -> float:
        """Of the time since `before`."""
        return round(100 * (self.stolen - before.stolen) / max(1, self.total - before.total), 1)
