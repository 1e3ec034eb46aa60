"""The loss against the samples' lengths, whatever they are packed with and whoever computes it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.trainer_data.test_order import samples_of

from qlora_trainer.data import IGNORED, build_sequences, collate, cut, share
from qlora_trainer.lengths import NUM_LENGTHS, length_range, losses_by_length, means_by_length


def test_a_range_ends_with_its_power_of_two() -> None:
    assert length_range(np.array([1, 2, 3, 4, 5, 1024, 1025])).tolist() == [0, 1, 2, 2, 3, 10, 11]


@given(st.lists(st.integers(2, 16), min_size=1, max_size=40), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_the_mean_of_a_length_knows_neither_packing_nor_world(
    lengths: list[int], packing: bool, micro: int, world: int
) -> None:
    samples = samples_of(lengths)
    sequences = build_sequences(samples, np.arange(len(samples)), packing, 16)
    batch = cut(range(len(sequences)), micro, 0)
    sums = np.zeros(NUM_LENGTHS)
    for rank in range(world):
        for one in share(batch, rank, world):
            arrays = collate(one, sequences, samples, 7, 16)
            losses = np.zeros(arrays.labels.shape)  # as TrainableModel.losses: what a position predicts is the next
            losses[:, :-1] = np.where(arrays.labels[:, 1:] != IGNORED, arrays.labels[:, 1:], 0)
            sums += losses_by_length(one, sequences, samples, losses)
    means = means_by_length(sums, sequences, samples)
    for longest, mean in means.items():
        own = [(i, n) for i, n in enumerate(lengths) if longest / 2 < n <= longest]
        assert np.isclose(mean, np.mean([100 * i + k for i, n in own for k in range(1, n)]))
    assert all(any(n <= longest for longest in means) for n in lengths)
