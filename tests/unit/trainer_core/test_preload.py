"""What importing everything says: nothing of a kernel that nobody calls, all else."""

import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest

ROOT = Path(__file__).parents[3]
OPS = Path(bitsandbytes.__file__).parent / "backends/cpu/ops.py"
SAYS = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
SCRIPT = f"""
import importlib, logging, sys
importlib.import_module(sys.argv[1])
import bitsandbytes.backends.cpu.ops as ops  # says it here where the CPU knows AVX512-BF16
ops.logger.warning({SAYS!r}, "and here on any CPU")
ops.logger.warning("anything else: %s", "heard")
"""


@pytest.mark.parametrize("module", ["qlora_trainer.preload", "hack.demo.adapter"])
def test_only_the_missing_cpu_kernel_is_silenced(module: str) -> None:
    assert SAYS in OPS.read_text(), "bitsandbytes says it otherwise: look at the filters again"
    command = [sys.executable, "-c", SCRIPT, module]
    heard = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    assert "gemm_4bit_forward" not in heard and "anything else: heard" in heard
