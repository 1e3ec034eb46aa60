"""Which samples a step trains on: a function of (seed, step) alone. Pure: arrays in, arrays out.

Rules: samples are packed into sequences once, whatever the world size; every epoch visits every sequence once in an
order drawn from (seed, epoch); step s takes the next `global_batch_size` sequences of that endless line, cut into micro
batches of fixed content. A rank takes every world_size-th micro batch; ranks that would do fewer get dummies of weight
zero, because a collective needs everybody. Nothing here knows which ranks there were before.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

from qlora_trainer.samples import SampleSet

IGNORED = -100  # label of a token that the loss leaves out
_PAD_MULTIPLE = 64
_EVAL_STREAM = 0xE7A1  # keeps the held-out draw apart from the epochs'
IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sequences:
    """Sequence i trains on samples[bounds[i]:bounds[i + 1]]; `num_targets` counts its tokens in the loss."""

    samples: IntArray
    bounds: IntArray
    num_targets: IntArray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def samples_of(self, sequence: int) -> IntArray:
        """Sample indices of a sequence, in their order."""
        return self.samples[self.bounds[sequence] : self.bounds[sequence + 1]]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass. `index` counts within the step over all ranks; a dummy trains nothing."""

    step: int
    index: int
    sequences: tuple[int, ...]
    dummy: bool = False


@dataclass(frozen=True)
class Tensors:
    """int64 arrays [B, S]: padded ids, labels (not shifted, IGNORED where not trained), positions that restart."""

    input_ids: IntArray
    labels: IntArray
    position_ids: IntArray


def pack(lengths: IntArray, capacity: int) -> list[list[int]]:
    """Best fit decreasing (arXiv:2404.10830): bins of sample indices, each at most `capacity` tokens."""
    spaces: list[int] = []  # distinct free spaces, ascending
    bins_of: dict[int, deque[list[int]]] = defaultdict(deque)
    bins: list[list[int]] = []
    for sample in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sample])
        assert 0 < length <= capacity
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            chosen = bins_of[space].popleft()
            if not bins_of[space]:
                spaces.pop(at)
        else:
            space, chosen = capacity, []
            bins.append(chosen)
        chosen.append(int(sample))
        rest = space - length
        if rest:
            if not bins_of[rest]:
                insort(spaces, rest)
            bins_of[rest].append(chosen)
    return bins


def build_sequences(samples: SampleSet, chosen: IntArray, packing: bool, max_length: int) -> Sequences:
    """Sequences over the chosen samples: packed, or one sample each."""
    if packing:
        bins = pack(samples.lengths[chosen], max_length)
        order = chosen[np.fromiter((i for one in bins for i in one), np.int64, len(chosen))]
        bounds = np.cumsum([0] + [len(one) for one in bins], dtype=np.int64)
    else:
        order, bounds = chosen, np.arange(len(chosen) + 1, dtype=np.int64)
    running = np.concatenate([[0], np.cumsum(samples.targets[order])])
    return Sequences(order, bounds, running[bounds[1:]] - running[bounds[:-1]])


def hold_out(num_samples: int, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Sample indices (training, evaluation): a draw from the seed, both ascending; at least one on each side."""
    if fraction == 0 or num_samples < 2:
        return np.arange(num_samples), np.arange(0)
    count = min(max(1, round(fraction * num_samples)), num_samples - 1)
    drawn = np.random.default_rng([seed, _EVAL_STREAM]).permutation(num_samples)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


@dataclass(frozen=True)
class BatchPlan:
    """The run's steps over `num_sequences` sequences."""

    num_sequences: int
    seed: int
    global_batch_size: int
    micro_batch_size: int
    num_steps: int
    end: int | None  # sequences in all when the run is measured in epochs; the last step may be smaller

    @classmethod
    def of(
        cls, num_sequences: int, seed: int, global_batch: int, micro_batch: int, max_steps: int | None, epochs: float
    ) -> "BatchPlan":
        """`max_steps` wins over epochs."""
        end = None if max_steps else max(1, ceil(epochs * num_sequences))
        steps = max_steps if max_steps else ceil((end or 0) / global_batch)
        return cls(num_sequences, seed, global_batch, micro_batch, steps, end)

    def sequences_of(self, step: int) -> list[int]:
        """Sequences of step `step` (from 0), in order."""
        first, last = step * self.global_batch_size, (step + 1) * self.global_batch_size
        last = last if self.end is None else min(last, self.end)
        return [self._at(position) for position in range(first, last)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_sequences)
        return int(permutation(self.seed, epoch, self.num_sequences)[place])

    def global_batch(self, step: int) -> list[MicroBatch]:
        """The micro batches of step `step`: the same for every world size."""
        return cut(self.sequences_of(step), self.micro_batch_size, step)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> IntArray:
    """The order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut(sequences: Sequence[int], micro_batch_size: int, step: int) -> list[MicroBatch]:
    """Micro batches of at most `micro_batch_size` sequences."""
    starts = range(0, len(sequences), micro_batch_size)
    return [MicroBatch(step, index, tuple(sequences[at : at + micro_batch_size])) for index, at in enumerate(starts)]


def share(batch: list[MicroBatch], rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's micro batches; every rank gets the same number, the missing ones are dummies."""
    rounds = ceil(len(batch) / world_size)
    places = range(rank, rounds * world_size, world_size)
    last = batch[-1]
    return [batch[at] if at < len(batch) else MicroBatch(last.step, at, last.sequences, dummy=True) for at in places]


def num_targets(batch: list[MicroBatch], sequences: Sequences) -> int:
    """Tokens in the loss of a global batch: what every rank's sum of losses is divided by."""
    return int(sum(sequences.num_targets[s] for micro in batch if not micro.dummy for s in micro.sequences))


def num_tokens(batch: list[MicroBatch], sequences: Sequences, samples: SampleSet) -> int:
    """Tokens of a global batch without padding."""
    lengths = samples.lengths
    return int(sum(lengths[sequences.samples_of(s)].sum() for micro in batch for s in micro.sequences))


def collate(micro: MicroBatch, sequences: Sequences, samples: SampleSet, pad_id: int, max_length: int) -> Tensors:
    """The arrays of a micro batch. Padding attends to itself: its positions restart, too."""
    rows = [sequences.samples_of(s) for s in micro.sequences]
    longest = max(int(samples.lengths[row].sum()) for row in rows)
    width = min(ceil(longest / _PAD_MULTIPLE) * _PAD_MULTIPLE, max_length)
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for sample in row:
            first, last = samples.offsets[sample], samples.offsets[sample + 1]
            end = at + int(last - first)
            ids[r, at:end] = samples.ids[first:last]
            trained = samples.mask[first:last].astype(bool) & ~np.bool_(micro.dummy)
            labels[r, at:end] = np.where(trained, ids[r, at:end], IGNORED)
            labels[r, at] = IGNORED  # a sample's first token must not be predicted from another sample
            positions[r, at:end] = np.arange(end - at)
            at = end
        positions[r, at:] = np.arange(width - at)
    return Tensors(ids, labels, positions)
