"""One rank of a group, a process of test_sharding.py: two steps and an evaluation a configuration.

Where shards can be read by the peers they are; in configurations whose name starts with fsdp2, FSDP2 gathers them.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.sources import source_of
from torch.distributed.device_mesh import init_device_mesh

from qlora_api.run import TrainConfig, parse_config
from qlora_trainer.errors import CorruptBase
from qlora_trainer.loader import ensure_packed
from qlora_trainer.model import TrainableModel, build_model
from qlora_trainer.peers import ENV_PEERS
from qlora_trainer.sharding import own_part

NUM_MICRO = 6  # of one global batch, whatever the number of ranks
CPU = torch.device("cpu")


def train(config: TrainConfig, model_dir: Path, cache_dir: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Two steps of plain gradient descent over micro batches that do not depend on the number of ranks."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = build_model(config, ensure_packed(config, source_of(model_dir), cache_dir, CPU), mesh, CPU, 1)
    model.verify()
    tokens = torch.randint(1, 300, (NUM_MICRO, 24), generator=torch.Generator().manual_seed(3))
    losses = {}
    for step in range(2):
        model.flat_grad.zero_()
        for micro in range(NUM_MICRO * rank // world_size, NUM_MICRO * (rank + 1) // world_size):
            rows = tokens[micro : micro + 1]
            model.set_step_seed(5, step, micro)
            loss = model.loss(rows, rows, None, 23 * NUM_MICRO)
            loss.backward()
            losses[step, micro] = loss.item()
        dist.all_reduce(model.flat_grad)
        if step == 0:
            with torch.no_grad():
                model.adapter.master.sub_(model.adapter.grad)
    model.eval()
    with torch.no_grad():
        evaluated = model.loss(tokens, tokens, None, 1).item()
    model.verify()
    damaged = damage(model, rank == world_size - 1)
    return {"grad": model.flat_grad.clone(), "losses": losses, "evaluated": evaluated, "damaged": damaged}


def damage(model: TrainableModel, mine: bool) -> str:
    """Flip a bit of this rank's part of layer 1, if it is `mine`; what `verify` then says on every rank."""
    dist.barrier()  # peers read without asking
    if mine:
        own_part(model.layers[1])[5] ^= 1
    dist.barrier()
    try:
        model.verify()
    except CorruptBase as error:
        return str(error)
    return ""


def run_cases(folder: Path, model_dir: Path, rank: int, world_size: int, port: int, cases: list[str]) -> None:
    """In a process of its own: what this rank saw goes into `folder`."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for case in cases:
        os.environ[ENV_PEERS] = "0" if case.startswith("fsdp2") else "1"
        result = train(parse_config((folder / case).read_text()), model_dir, folder / "cache", rank, world_size)
        torch.save(result, folder / f"{case}-{world_size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
