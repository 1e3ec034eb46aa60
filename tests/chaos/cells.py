"""The cells of the kill grid: where, who, how, in which world."""

import itertools
import random
from dataclasses import dataclass

POINTS = (
    "data",
    "forward",
    "backward",
    "all-reduce",
    "optimizer",
    "snapshot",
    "header-write",
    "upload",
    "manifest",
    "rendezvous",
    "warm-up",
)
WHO = ("rank 0", "other", "two", "all")
HOW = ("SIGKILL", "SIGTERM", "SIGSTOP", "node")  # node: all of the pod's processes die at once
# On Kubernetes: a worker killed, a pod deleted (SIGTERM first) or removed by force, its node killed with and without
# its peers hearing of it, its link cut, and the operator killed in the same moment as a worker.
HOW_ON_CLUSTER = ("SIGKILL", "delete", "force delete", "node loudly", "node silently", "partition", "operator, too")
POINTS_ON_CLUSTER = ("forward", "backward", "all-reduce", "optimizer", "snapshot", "upload", "manifest", "rendezvous")
WITHOUT_NOTICE = ("node", "force delete", "node loudly", "node silently")  # the pod's memory is gone
STANDING_STILL = ("SIGSTOP", "partition")
WORLDS = ("1", "2", "3", "3 changed")  # changed: what was lost comes back later, the run goes on without it
MAX_NODES = 3


@dataclass(frozen=True)
class Cell:
    """One fault."""

    point: str
    who: str
    how: str
    world: str

    @property
    def size(self) -> int:
        return int(self.world[0])

    @property
    def hits_all(self) -> bool:
        """No pod is spared; a lone pod's rank 0 is all there is."""
        return len(self.victims()) == self.size

    @property
    def lag_allowed(self) -> bool:
        """All pods gone without notice, or given up for a newcomer that has no snapshot: the durable tier is left."""
        given_up = self.stands_still and self.point == "warm-up"
        return self.hits_all and (self.how in WITHOUT_NOTICE or given_up)

    @property
    def stands_still(self) -> bool:
        """The victims come back as they were."""
        return self.how in STANDING_STILL

    def victims(self) -> tuple[int, ...]:
        """Ranks that are hit."""
        return {"rank 0": (0,), "other": (self.size - 1,), "two": (0, self.size - 1), "all": tuple(range(self.size))}[
            self.who
        ]

    def __str__(self) -> str:
        return f"{self.point} / {self.who} / {self.how} / world {self.world}"


def every_cell() -> list[Cell]:
    """The whole grid without the cells that mean nothing: no other than rank 0 in a world of one."""
    cells = [Cell(*values) for values in itertools.product(POINTS, WHO, HOW, WORLDS)]
    return [cell for cell in cells if _makes_sense(cell)]


def _makes_sense(cell: Cell) -> bool:
    if cell.size == 1 and cell.who in ("other", "two"):
        return False
    if cell.size == 2 and cell.who == "two":
        return False  # the same as all
    if cell.point == "warm-up" and cell.size == MAX_NODES:
        return False  # nobody is missing who could warm up
    return not (cell.world == "3 changed" and cell.who == "all")


def every_cell_on_cluster() -> list[Cell]:
    """The grid on Kubernetes; a lost node comes back after the run went on without it."""
    values = itertools.product(POINTS_ON_CLUSTER, WHO, HOW_ON_CLUSTER, WORLDS[:3])
    return [cell for cell in (Cell(*value) for value in values) if _makes_sense(cell)]


def sample(cells: list[Cell], number: int, seed: int) -> list[Cell]:
    """So many of them, every point with every way first, then at random; sorted so that worlds change rarely."""
    chance = random.Random(seed)
    cells = list(cells)
    chance.shuffle(cells)
    pairs: set[tuple[str, str]] = set()
    first = [cell for cell in cells if (cell.point, cell.how) not in pairs and not pairs.add((cell.point, cell.how))]
    rest = [cell for cell in cells if cell not in first]
    chosen = (first + rest)[:number]
    return sorted(chosen, key=lambda cell: (cell.world, cells.index(cell)))
