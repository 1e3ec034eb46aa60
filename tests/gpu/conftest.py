"""These tests need CUDA; without it they fail, they are never skipped."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def gpu() -> torch.device:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA GPU: run it on a machine that has one"
    return torch.device("cuda", 0)
