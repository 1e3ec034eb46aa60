"""Two GPUs: packed bytes through FSDP2, two ranks against one, a resume at another world size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    assert torch.cuda.device_count() >= 2, "this test needs two GPUs"
    folder = tmp_path_factory.mktemp("two")
    for world_size in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size), str(SCRIPT)]
        environment = {**os.environ, "QLORA_COMPILE": "0"}
        subprocess.run([*command, str(folder)], check=True, timeout=300, env=environment)
    return {n: json.loads((folder / f"world-{n}.json").read_text()) for n in (1, 2)}


def test_bytes_survive_the_gather(results):
    """Viewed as bf16, alone in their group, bytes are damaged by the gather; through the hooks they are not."""
    assert results[2]["wrong_bytes"]["hooks"] == 0
    assert results[2]["wrong_bytes"]["bf16"] > 0


@pytest.mark.parametrize("case", ["peers", "peers, recomputed", "FULL_SHARD", "SHARD_GRAD_OP", "offload"])
def test_two_ranks_compute_what_one_does(case, results):
    assert results[2][case]["losses"] == pytest.approx(results[1]["NO_SHARD"]["losses"], rel=2e-3)
    assert results[2][case]["peers"] == case.startswith("peers")
    assert results[2][case]["norm"] == pytest.approx(results[1]["NO_SHARD"]["norm"], rel=2e-2)


def test_a_resume_at_two_ranks_goes_on_as_one_rank_did(results):
    assert results[2]["resumed"] == pytest.approx(results[1]["NO_SHARD"]["losses"][3:], rel=2e-3)
