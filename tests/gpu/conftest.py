"""These tests need CUDA; without it they fail, they are never skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not torch.cuda.is_available() and not session.config.option.collectonly:
        pytest.exit("tests/gpu needs a CUDA GPU: run it on a machine that has one", returncode=2)


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    return torch.device("cuda", 0)
