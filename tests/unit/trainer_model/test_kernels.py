"""The Triton kernels in Triton's interpreter, in a process of its own: it is chosen when triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_kernels_compute_on_a_cpu_what_torch_does():
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "21 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]
