"""Thousands of seeded histories: lost passes, half-done actions, evictions, crashes, silent agents, late reports."""

from collections import Counter

import pytest
from tests.unit.operator.simulator import Simulation


@pytest.mark.parametrize("block", range(8))
def test_every_history_settles_and_keeps_the_rules(block: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(block * 250, block * 250 + 250):
        max_nodes = 1 + seed % 4
        simulation = Simulation(seed, max_nodes, 1 + seed % 3 if seed % 3 < max_nodes else 1)
        ends[simulation.run()] += 1
    assert ends["AdapterUploaded"] > 100, ends
