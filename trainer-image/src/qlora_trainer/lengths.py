"""An evaluation's loss against the samples' lengths, from one forward pass. Pure: arrays in, arrays out.

Rules: what a rank sums up adds up over ranks and micro batches; a sample counts where its own length is, wherever it
was packed; range i holds samples of 2**(i - 1) + 1 to 2**i tokens.
"""

from typing import Any

import numpy as np

from qlora_trainer.data import IntArray, MicroBatch, Sequences
from qlora_trainer.samples import SampleSet

NUM_LENGTHS = 32  # ranges
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


def length_range(lengths: IntArray) -> IntArray:
    """For each sample its i of 2**(i - 1) < tokens <= 2**i."""
    return np.ceil(np.log2(lengths)).astype(np.int64)


def losses_by_length(micro: MicroBatch, sequences: Sequences, samples: SampleSet, losses: FloatArray) -> FloatArray:
    """Sums [NUM_LENGTHS] of a micro batch's token losses [B, S] (TrainableModel.losses) by the samples' lengths."""
    sums = np.zeros(NUM_LENGTHS)
    for row, sequence in zip(losses, micro.sequences, strict=True):
        lengths = samples.lengths[sequences.samples_of(sequence)]
        starts = np.cumsum(lengths) - lengths
        np.add.at(sums, length_range(lengths), np.add.reduceat(row, starts))  # what pads the row has no loss
    return sums


def means_by_length(sums: FloatArray, sequences: Sequences, samples: SampleSet) -> dict[int, float]:
    """Longest sample of a range, in tokens -> mean loss of all sequences' tokens in samples of this range."""
    ranges = length_range(samples.lengths[sequences.samples])
    targets = np.bincount(ranges, samples.targets[sequences.samples], NUM_LENGTHS)
    return {2**i: float(sums[i] / targets[i]) for i in np.flatnonzero(targets).tolist()}
