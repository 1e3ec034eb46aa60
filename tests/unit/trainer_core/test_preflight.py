"""The check before training passes on a machine that is right, and says which of its parts is not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer import faults, preflight
from qlora_trainer.errors import FaultyNode
from qlora_trainer.preflight import SIZES, accuse, check_compute, check_memory, check_node, deviations

CPU = torch.device("cpu")


def test_this_machine_is_right(env) -> None:
    check_node(env)


def test_the_sizes_of_a_gpu_are_within_its_tolerance() -> None:
    """The product that a GPU computes, in one round on the CPU."""
    check_compute(CPU, preflight.Sizes(1024, SIZES["cuda"].inner, 1, 0, 0))


@pytest.mark.parametrize(
    ("point", "check", "says"),
    [
        (
            "preflight-compute",
            check_compute,
            r"the same bfloat16 product differed in 2 of 131072 numbers when repeated",
        ),
        ("preflight-memory", check_memory, r"1 of 2097152 words of memory were not read back as written"),
    ],
)
def test_damage_is_found_and_told(
    point: str, check: Callable[..., None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.ENV_FAULTS, str(tmp_path / "plan"))
    monkeypatch.setenv("QLORA_NODE_NAME", "node-a")
    (tmp_path / "plan").write_text(json.dumps({"id": "f", "point": point, "action": "damage"}))
    with pytest.raises(FaultyNode, match=rf"pre-flight check of cpu on node node-a: {says}\. Cordon the node"):
        check(CPU, SIZES["cpu"])
    check(CPU, SIZES["cpu"])  # a fault happens once


@given(st.integers(0, 255), st.integers(0, 63), st.sampled_from([1.0, -3.0, float("nan"), float("inf")]))
def test_one_wrong_number_is_found(row: int, column: int, off: float) -> None:
    exact = torch.rand(256, 64, dtype=torch.float64)
    found = exact.bfloat16().double()
    assert deviations(found, exact, inner=64) == (0, pytest.approx(0, abs=2**-8))
    found[row, column] += off
    count, worst = deviations(found, exact, inner=64)
    assert count == 1 and worst >= 0.9


@pytest.mark.parametrize(
    ("wrong", "accused"),
    [
        ([[0, 0], [0, 0]], []),
        ([[0, 5], [0, 0]], [0, 1]),
        ([[0, 0, 0], [9, 0, 9], [0, 0, 0]], [1]),
        ([[0, 0, 3], [0, 0, 3], [0, 0, 0]], [2]),
        ([[0, 0, 3], [0, 0, 0], [0, 0, 0]], [0, 2]),
        ([[7, 0, 0], [7, 0, 0], [0, 0, 0]], [0, 1]),
    ],
    ids=["nothing", "two cannot tell", "receives badly", "sends badly", "one link", "wrong sums alone"],
)
def test_who_is_to_blame(wrong: list[list[int]], accused: list[int]) -> None:
    assert accuse(wrong) == accused


@given(st.integers(3, 8), st.data())
def test_one_bad_rank_among_many_is_accused_alone(world: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(0, world - 1))
    counts = st.integers(0, 3)
    wrong = [[data.draw(counts) if bad in (r, s) and r != s else 0 for s in range(world)] for r in range(world)]
    for other in range(world):  # at least one direction of each of its links
        if other != bad and not (wrong[bad][other] or wrong[other][bad]):
            wrong[bad][other] = 1
    assert accuse(wrong) == [bad]
