"""The cells of the kill grid that need no cluster.

Each group of cells strikes one run of the real trainer; afterwards the run is compared with an undisturbed one: the
same samples in the same order, the same adapter.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import tiny
from tests.chaos.cells import Cell
from tests.chaos.driver import Driver
from tests.chaos.faultplan import FILE_NAME, FaultPlan
from tests.chaos.local import LocalCluster
from tests.chaos.report import Report, carry_out
from tests.chaos.verify import Steps, compare, read_steps
from tests.chaos.zygote import start_zygote

from qlora_operator.settings import Settings

CELLS_PER_RUN = 12
STEPS_PER_CELL = 40
SPARE_STEPS = 25  # a cell begins only while so many steps are left
SETTINGS = Settings(
    trainer_image="none",
    coordinator_url="http://none",
    lease_seconds=2.0,
    drop_seconds=0.5,
    fresh_seconds=1.2,
    silent_seconds=5.0,
    start_wait_seconds=3.0,
    grace_period_seconds=20,
)


class Grid:
    """Runs of one length over one model; the undisturbed one first."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder, self._num_steps, self._number = folder, num_steps, 0
        tiny.make_sources(folder)
        self._slow = folder / "slow"
        self._reference = self._undisturbed()

    def strike(self, cells: list[Cell], report: Report) -> list[Cell]:
        """One run with these faults, one after the other; then the comparison. Returns the cells it had no time for."""
        self._slow.touch()
        with self._cluster() as cluster:
            driver = Driver(cluster, FaultPlan(lambda: [cluster.folder / FILE_NAME]))
            num_failed = len(report.failed)
            left = report.strike(driver, cells, self._num_steps - SPARE_STEPS)
            if len(report.failed) > num_failed:
                return left
            self._slow.unlink()
            steps = self._finish(cluster)
        found = compare(steps, cluster.folder / "bucket", *self._reference)
        report.comparisons.append(found)
        print(f"run {self._number}: {found}", flush=True)
        shutil.rmtree(cluster.folder)
        return left

    def _undisturbed(self) -> tuple[Steps, Path]:
        started = time.monotonic()
        with self._cluster(max_nodes=1) as cluster:
            steps = self._finish(cluster)
        print(f"reference of {self._num_steps} steps in {time.monotonic() - started:.0f} s", flush=True)
        return steps, cluster.folder / "bucket"

    def _finish(self, cluster: LocalCluster) -> Steps:
        """Let the run end and read what its pods traced."""
        cluster.wait_for(lambda: cluster.is_over, 600, "the end of the run")
        assert cluster.status.artifacts is not None, cluster.describe()
        return read_steps(sorted(cluster.folder.glob("chaos-*/run")))

    def _cluster(self, max_nodes: int = 3) -> LocalCluster:
        self._number += 1
        folder = self._folder / f"run-{self._number}"
        folder.mkdir()
        environment = {
            "QLORA_WORKER": "tests.chaos.real:run",
            "QLORA_WARM_UP": "tests.chaos.real:warm",
            "QLORA_FLUSH": "tests.chaos.real:flush",
            "QLORA_TRACE": "1",
            "QLORA_DEVICE": "cpu",
            "QLORA_CACHE_DIR": str(self._folder / "cache"),
            "QLORA_FAULTS": str(folder / FILE_NAME),
            "CHAOS_OUTPUT": f"file://{folder}/bucket",
            "CHAOS_SLOW": str(self._slow),
        }
        config = tiny.make_config(self._folder, f"{self._number:08d}", self._num_steps, max_nodes)
        return LocalCluster(config, folder, environment, SETTINGS, fork=True)


def run(cells: list[Cell], report: Report) -> None:
    """Carry the cells out."""
    os.environ.update(QLORA_WORKER="tests.chaos.real:run", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    start_zygote()
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/dev/shm") as name:
        grid = Grid(Path(name), STEPS_PER_CELL * min(len(cells), CELLS_PER_RUN))
        carry_out(cells, CELLS_PER_RUN, lambda group: grid.strike(group, report))
