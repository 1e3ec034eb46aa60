"""Laws of the data order: nothing of it depends on who is there to train."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data import IGNORED, BatchPlan, build_sequences, collate, hold_out, num_targets, pack, share
from qlora_trainer.samples import SampleSet

LENGTHS = st.lists(st.integers(2, 16), min_size=1, max_size=60)
SHAPE = st.tuples(st.integers(1, 12), st.integers(1, 4))  # micro batches a step, sequences a micro batch


def samples_of(lengths: list[int]) -> SampleSet:
    """Sample i of the given length: ids count up from 100 * i, all trained on."""
    return SampleSet.of_lists([([100 * i + k for k in range(n)], [1] * n) for i, n in enumerate(lengths)])


@given(LENGTHS, st.booleans(), SHAPE, st.integers(0, 5), st.integers(1, 3))
def test_every_sample_once_an_epoch(
    lengths: list[int], packing: bool, shape: tuple[int, int], seed: int, epochs: int
) -> None:
    samples = samples_of(lengths)
    sequences = build_sequences(samples, np.arange(len(samples)), packing, 16)
    plan = BatchPlan.of(len(sequences), seed, shape[0] * shape[1], shape[1], None, epochs)
    seen = [s for step in range(plan.num_steps) for q in plan.sequences_of(step) for s in sequences.samples_of(q)]
    assert Counter(seen) == dict.fromkeys(range(len(lengths)), epochs)


@given(st.integers(1, 40), SHAPE, st.integers(1, 9), st.integers(0, 4), st.integers(0, 6))
def test_shares_of_any_world_are_the_batch(
    num_sequences: int, shape: tuple[int, int], world: int, seed: int, step: int
) -> None:
    plan = BatchPlan.of(num_sequences, seed, shape[0] * shape[1], shape[1], 100, 1)
    batch = plan.global_batch(step)
    shares = [share(batch, rank, world) for rank in range(world)]
    assert len({len(one) for one in shares}) == 1, "a collective needs everybody the same number of times"
    together = sorted((m for one in shares for m in one if not m.dummy), key=lambda m: m.index)
    assert together == batch


@given(st.integers(1, 30), SHAPE, st.integers(0, 3), st.integers(0, 20))
def test_a_step_needs_no_past(num_sequences: int, shape: tuple[int, int], seed: int, step: int) -> None:
    size = shape[0] * shape[1]
    line = BatchPlan.of(num_sequences, seed, 1, 1, 10_000, 1)
    plan = BatchPlan.of(num_sequences, seed, size, shape[1], 10_000, 1)
    assert plan.sequences_of(step) == [line.sequences_of(step * size + k)[0] for k in range(size)]


@given(LENGTHS)
def test_packing_fills_and_loses_nothing(lengths: list[int]) -> None:
    bins = pack(np.array(lengths), 16)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in one) for one in bins]
    assert max(totals) <= 16
    assert sum(total <= 8 for total in totals) <= 1, "two half-empty bins would have been one"


@settings(deadline=None, max_examples=10)
@given(LENGTHS)
def test_packing_is_as_tight_as_trls(lengths: list[int]) -> None:
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}), 16)
    assert len(pack(np.array(lengths), 16)) == len(theirs)


@given(LENGTHS, st.booleans(), st.integers(1, 4))
def test_collated_samples_stay_apart(lengths: list[int], packing: bool, micro: int) -> None:
    samples = samples_of(lengths)
    sequences = build_sequences(samples, np.arange(len(samples)), packing, 16)
    plan = BatchPlan.of(len(sequences), 0, micro, micro, None, 1)
    found: list[int] = []
    for step in range(plan.num_steps):
        batch = plan.global_batch(step)
        targets = 0
        for one in batch:
            arrays = collate(one, sequences, samples, 7, 16)
            starts = arrays.position_ids == 0
            assert (arrays.labels[starts] == IGNORED).all(), "a first token has nothing that predicts it"
            trained = arrays.labels != IGNORED
            assert (arrays.labels[trained] == arrays.input_ids[trained]).all()
            before = np.roll(arrays.input_ids, 1, axis=1)
            assert (arrays.input_ids[trained] == before[trained] + 1).all(), "a target follows its own sample"
            targets += int(trained.sum())
            found += arrays.labels[trained].tolist()
        assert targets == num_targets(batch, sequences)
    assert sorted(found) == sorted(100 * i + k for i, n in enumerate(lengths) for k in range(1, n))


def test_dummies_train_nothing() -> None:
    samples = samples_of([5, 6, 7])
    sequences = build_sequences(samples, np.arange(3), False, 16)
    batch = BatchPlan.of(3, 0, 1, 1, 10, 1).global_batch(0)
    dummy = share(batch, 1, 2)[0]
    arrays = collate(dummy, sequences, samples, 0, 16)
    assert dummy.dummy and (arrays.labels == IGNORED).all()
    assert num_targets(share(batch, 1, 2), sequences) == 0


@given(st.integers(2, 50), st.floats(0.01, 0.5), st.integers(0, 9))
def test_held_out_samples_are_not_trained_on(num: int, fraction: float, seed: int) -> None:
    train, held = hold_out(num, fraction, seed)
    assert len(train) and len(held)
    assert sorted([*train, *held]) == list(range(num))
    again = hold_out(num, fraction, seed)
    assert (again[0] == train).all() and (again[1] == held).all()
