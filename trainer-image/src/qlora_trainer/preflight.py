"""A short check of the node before it trains: does each GPU compute and remember rightly, do the links carry what was
sent? A card that computes wrongly without an error spoils a run silently, so it is looked for before the first step.

`check_node` runs while the pod warms up, `check_links` at every start of the workers, once their group is up. Both take
milliseconds on a CPU and below two seconds on a GPU.

Rules: inputs come from a seed or an index; sums are of integers, so that they are known exactly whatever their order;
every failure says which check, where, and by how much.
A check of one rank's own parts raises FaultyNode there; one of the links is judged by all ranks together (`accuse`), so
that all end: those to blame with FaultyNode, the others as peers of a lost one.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_api.run import ENV_NODE_NAME
from qlora_trainer import faults
from qlora_trainer.control import WorkerEnv
from qlora_trainer.errors import FaultyNode, LostPeer, TrainerError

LINK_SECONDS = 60.0  # a collective of a few MB that has not ended then will not
_SEED = 20_261_122
_RELATIVE_ERROR = 2.0**-7  # bfloat16 keeps 8 bits, rounded to nearest 2^-9; a split sum may round once more
_PATTERN = 0x5DEECE66D  # multiplier of a linear congruential generator: neighbours differ in many bits
_WHAT_TO_DO = "Cordon the node and have it examined; the pod is started elsewhere if another node has room."


@dataclass(frozen=True)
class Sizes:
    """How much is tried: enough to occupy every part of a GPU, little enough for a CPU."""

    rows: int  # of the square product
    inner: int
    rounds: int
    memory_bytes: int
    link_numbers: int  # int64 of the all-reduce, and bytes of the all-gather


SIZES = {"cuda": Sizes(4096, 1024, 32, 256 << 20, 1 << 18), "cpu": Sizes(256, 128, 2, 8 << 20, 1 << 14)}


def check_node(env: WorkerEnv) -> None:
    """Every device of this node that the pod holds. Raises FaultyNode."""
    on_gpu = env.device_type == "cuda"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if on_gpu else [torch.device("cpu")]
    for device in devices:
        check_compute(device, SIZES[env.device_type])
        check_memory(device, SIZES[env.device_type])


def check_compute(device: torch.device, sizes: Sizes) -> None:
    """bfloat16 products: every round equal to the first bit for bit, and rows of every tile near the exact product."""
    random = torch.Generator().manual_seed(_SEED)
    left, right = (torch.rand(shape, generator=random) * 2 - 1 for shape in ((sizes.rows, sizes.inner),) * 2)
    a, b = left.to(device, torch.bfloat16), right.to(device, torch.bfloat16).T
    first = a @ b
    if faults.damages("preflight-compute"):
        first[0, 0] += 4
    differing = sum(((a @ b).view(torch.int16) != first.view(torch.int16)).sum() for _ in range(sizes.rounds))
    if count := int(differing):
        raise FaultyNode(
            f"{_where(device)}: the same bfloat16 product differed in {count} of {first.numel() * sizes.rounds} numbers"
            f" when repeated. {_WHAT_TO_DO}"
        )
    rows = torch.arange(0, sizes.rows, 64)
    exact = left.bfloat16()[rows].double() @ right.bfloat16().double().T
    count, worst = deviations(first.cpu()[rows].double(), exact, sizes.inner)
    if count:
        raise FaultyNode(
            f"{_where(device)}: {count} of {exact.numel()} numbers of a bfloat16 product are wrong, by up to"
            f" {worst:.3g}. {_WHAT_TO_DO}"
        )


def deviations(found: Tensor, exact: Tensor, inner: int) -> tuple[int, float]:
    """How many numbers are further from the exact product than bfloat16 explains, and by how much at most; NaN is."""
    distance = (found - exact).abs().nan_to_num(nan=math.inf)
    allowed = _RELATIVE_ERROR * (exact.abs() + inner**0.5 / 3)  # the standard deviation of such a product
    return int((distance > allowed).sum()), float(distance.max())


def check_memory(device: torch.device, sizes: Sizes) -> None:
    """A pattern and its complement, written to memory and read back."""
    size = sizes.memory_bytes
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 2)
    chunks = torch.empty(size // 8, dtype=torch.int64, device=device).chunk(8)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for mask in (0, -1):
        for number, chunk in enumerate(chunks):
            chunk.copy_(_pattern(len(chunk), number, device).bitwise_xor_(mask))
        if faults.damages("preflight-memory"):
            chunks[3][5] ^= 1 << 9
        for number, chunk in enumerate(chunks):
            wrong += (chunk != _pattern(len(chunk), number, device).bitwise_xor_(mask)).sum()
    if count := int(wrong):
        raise FaultyNode(
            f"{_where(device)}: {count} of {size // 8 * 2} words of memory were not read back as written. {_WHAT_TO_DO}"
        )


def check_links(env: WorkerEnv, device: torch.device) -> None:
    """One all-reduce and one all-gather over all ranks, compared with what is known on every rank.

    All ranks raise together: FaultyNode those to blame, LostPeer the others. A collective that does not end raises
    TrainerError: nobody can tell whose link it is.
    """
    length, world = SIZES[env.device_type].link_numbers, env.world_size
    total = _pattern(length, 0, device) * (env.rank + 1)
    _finish(dist.all_reduce(total, async_op=True), "all-reduce", env)
    sent = _pattern(length, env.rank, device)
    received = [torch.empty_like(sent) for _ in range(world)]
    _finish(dist.all_gather(received, sent, async_op=True), "all-gather", env)
    if faults.damages("preflight-links"):
        for other in range(world):
            received[other][7] ^= 1
    wrong = [(received[other] != _pattern(length, other, device)).sum() for other in range(world)]
    wrong[env.rank] += (total != _pattern(length, 0, device) * (world * (world + 1) // 2)).sum()
    matrix = [torch.empty(world, dtype=torch.int64, device=device) for _ in range(world)]
    _finish(dist.all_gather(matrix, torch.stack(wrong), async_op=True), "all-gather", env)
    found = [row.tolist() for row in matrix]
    accused = accuse(found)
    if not accused:
        return
    words = sum(map(sum, found))
    what = f"the check of the links before the first step found {words} wrong words of {length} between each two ranks"
    ranks = ", ".join(map(str, accused))
    if env.rank in accused:
        raise FaultyNode(f"{_where(device)}: {what}, most at rank {ranks}. {_WHAT_TO_DO}")
    raise LostPeer(f"{what}, most at rank {ranks}")


def accuse(wrong: Sequence[Sequence[int]]) -> list[int]:
    """The ranks that take part in most of what went wrong, ascending; none when nothing did.

    `wrong[r][s]` counts what rank r got wrong from rank s; `wrong[r][r]` what it got wrong of the sum over all.
    """
    world = range(len(wrong))
    bad = [[count > 0 for count in row] for row in wrong]
    scores = [sum(bad[r][s] + bad[s][r] for s in world if s != r) for r in world]
    scores = scores if any(scores) else [int(bad[r][r]) for r in world]
    return [r for r in world if scores[r] and scores[r] == max(scores)]


def _finish(work: dist.Work | None, name: str, env: WorkerEnv) -> None:
    """Wait for a collective, but not for ever: a dead link may carry nothing and say nothing."""
    assert work is not None
    deadline = time.monotonic() + LINK_SECONDS
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TrainerError(
                f"an {name} of a few MB over {env.world_size} ranks did not end within {LINK_SECONDS:.0f} s before the"
                " first step: a peer hangs, or a link or NCCL's choice of interface (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
                " carries nothing; see the logs of all pods with NCCL_DEBUG=INFO in podTemplate"
            )
        time.sleep(0.0005)
    work.wait()


def _pattern(length: int, salt: int, device: torch.device) -> Tensor:
    """int64 words whose bits differ from each other and from those of another salt; the product wraps."""
    return (torch.arange(length, dtype=torch.int64, device=device) + salt * 7919 + 1) * _PATTERN


def _where(device: torch.device) -> str:
    """Device and node, for a person."""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    node = os.environ.get(ENV_NODE_NAME)
    return f"pre-flight check of {device}{name}" + (f" on node {node}" if node else "")
