"""Thousands of seeded histories: lost passes, half-done actions, evictions, crashes, silent agents, late reports."""

import os
from collections import Counter

import pytest
from tests.unit.operator.simulator import Simulation

HISTORIES = int(os.environ.get("SIMULATED_HISTORIES", "1200"))
BLOCKS = 8


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_history_settles_and_keeps_the_rules(block: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(block, HISTORIES, BLOCKS):
        max_nodes = 1 + seed % 4
        simulation = Simulation(seed, max_nodes, 1 + seed % 3 if seed % 3 < max_nodes else 1)
        ends[simulation.run()] += 1
    assert ends["AdapterUploaded"] > HISTORIES / BLOCKS / 3, ends
