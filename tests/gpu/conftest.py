"""These tests need CUDA; without it they fail, they are never skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


NEEDS = "tests/gpu needs a CUDA GPU: run it on a machine that has one"


def pytest_collection_finish(session: pytest.Session) -> None:
    """With nothing else to run, one sentence instead of an error for each test."""
    only_these = all(Path(__file__).parent in item.path.parents for item in session.items)
    if only_these and not torch.cuda.is_available() and not session.config.option.collectonly:
        pytest.exit(NEEDS, returncode=2)


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), NEEDS
    return torch.device("cuda", 0)
