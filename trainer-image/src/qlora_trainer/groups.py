"""Groups of linears that share their input: what the operators have to know about one, and its weights.

Rules: a spec is equal for the same linears of all layers, so that they share compiled code; weights are dequantized for
one product and never kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from qlora_trainer.quant import LowRank, Scheme, Stored, Tables, dequantize

Factors = tuple[Tensor, Tensor]  # a group's A and B, stacked, in the compute type


@dataclass(frozen=True)
class Part:
    """Where one adapted member's numbers are: output and its columns, rows of B, columns of xa."""

    output: int
    columns: slice
    b_rows: slice
    xa: slice


@dataclass(frozen=True)
class GroupSpec:
    """What the operator has to know about a group; equal for the same linears of all layers."""

    members: tuple[Stored, ...]
    adapted: tuple[bool, ...]  # which members have an adapter
    scheme: Scheme
    rank: int
    scale: float
    dropout: float
    last: bool = False  # nothing in the layer saves this group's output for its backward pass

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(member.rows for member in self.members)

    @property
    def columns(self) -> int:
        return self.members[0].columns

    @property
    def num_adapters(self) -> int:
        return sum(self.adapted)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of every output: one output for all members, or one each where they are wide.

        Narrow members gain by one product; of wide ones (gate and up) the gradients would have to be put side by side.
        """
        return self.rows if min(self.rows) > self.columns else (sum(self.rows),)

    def share(self, member: int, a: Tensor, b: Tensor) -> LowRank | None:
        """What its adapter adds to a member's weight, from the group's factors; None without one."""
        if not self.adapted[member]:
            return None
        part = self.parts[sum(self.adapted[:member])]
        return LowRank(a[part.xa], b[part.b_rows], self.scale)

    @cached_property
    def parts(self) -> list[Part]:
        """Of every adapted member."""
        separate = len(self.widths) == len(self.rows)
        result, b_end = list[Part](), 0
        for index, (rows, end, adapted) in enumerate(zip(self.rows, accumulate(self.rows), self.adapted, strict=True)):
            if adapted:
                xa = slice(len(result) * self.rank, (len(result) + 1) * self.rank)
                output, columns = (index, slice(0, rows)) if separate else (0, slice(end - rows, end))
                result.append(Part(output, columns, slice(b_end, b_end + rows), xa))
                b_end += rows
        return result


_specs: list[tuple[GroupSpec, dict[torch.device, Tables], Tables]] = []


def register(spec: GroupSpec, tables: Tables) -> int:
    """The key under which the operator finds the spec: the same for equal specs."""
    for key, (known, _, _) in enumerate(_specs):
        if known == spec:
            return key
    _specs.append((spec, {}, tables))
    return len(_specs) - 1


def spec_of(key: int) -> GroupSpec:
    return _specs[key][0]


def _tables(key: int, device: torch.device) -> Tables:
    _, by_device, tables = _specs[key]
    if device not in by_device:
        by_device[device] = tables.to(device)
    return by_device[device]


def weight_of(
    blob: Tensor, key: int, dtype: torch.dtype, members: range | None = None, factors: Factors | None = None
) -> Tensor:
    """The members' dequantized weights stacked, (sum of rows, columns), contiguous; unquantized ones are not copied.

    With `factors` their adapters' share is added before the one rounding to `dtype`.
    """
    spec = spec_of(key)
    members = range(len(spec.members)) if members is None else members
    stored = [spec.members[index] for index in members]
    starts, ends = [s.codes[0] for s in stored], [s.end for s in stored]
    if spec.scheme.type == "none" and spec.scheme.dtype == dtype and starts[1:] == ends[:-1] and factors is None:
        return blob[starts[0] : ends[-1]].view(dtype).view(-1, spec.columns)
    weight = torch.empty(sum(s.rows for s in stored), spec.columns, dtype=dtype, device=blob.device)
    tables = _tables(key, blob.device)
    start = 0
    for index, member in zip(members, stored, strict=True):
        out = weight[start : start + member.rows]
        dequantize(blob, member, spec.scheme, tables, out, spec.share(index, *factors) if factors else None)
        start += member.rows
    return weight


def output_weights(blob: Tensor, key: int, dtype: torch.dtype, factors: Factors | None = None) -> Iterator[Tensor]:
    """The weight of every output as `weight_of` gives it, one at a time: no more than one of them needs memory."""
    spec = spec_of(key)
    if len(spec.widths) == 1:
        yield weight_of(blob, key, dtype, factors=factors)
        return
    for index in range(len(spec.members)):
        yield weight_of(blob, key, dtype, range(index, index + 1), factors)
