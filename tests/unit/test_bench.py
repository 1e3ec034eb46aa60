"""What the GPU bench makes of its workers' results."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_gpu

RANKS = [
    {"name": "case", "rank": 0, "tok_s": 10, "peak_gib": 4},
    {"name": "case", "rank": 1, "tok_s": 11, "peak_gib": 5},
    {"name": "case", "rank": 2, "tok_s": 12, "peak_gib": 3},
]


@pytest.mark.parametrize("order", list(itertools.permutations(RANKS)))
def test_figures_are_rank_0s_and_peaks_the_worst_ranks_whoever_was_first(order: tuple[dict[str, Any], ...]) -> None:
    known: dict[str, Any] = {}
    for result in order:
        known = bench_gpu.joined(known, result)
    assert known == {"name": "case", "rank": 0, "tok_s": 10, "peak_gib": 5}


@pytest.mark.parametrize(
    ("lines", "code", "failed"),
    [
        (RANKS, 0, []),
        (RANKS, 3, ["out"]),
        ([RANKS[0], {"name": "case", "rank": 1, "error": "out of memory"}], 0, ["case"]),
    ],
)
def test_what_failed_is_remembered(tmp_path: Path, lines: list[dict[str, Any]], code: int, failed: list[str]) -> None:
    bench = bench_gpu.Bench(tmp_path)
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bench.run([sys.executable, "-c", f"raise SystemExit({code})"], out, 60)
    assert bench.failed == failed and bench.results["case"]["tok_s"] == 10
    assert ("error" in bench.results["case"]) == (failed == ["case"])
