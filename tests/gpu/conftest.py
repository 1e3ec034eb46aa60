"""These tests need CUDA; without it they fail, they are never skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA GPU: run it on a machine that has one"
    return torch.device("cuda", 0)
