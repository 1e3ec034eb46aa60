"""One rank of test_two.py (run by torchrun): the same global batches, sharded in every way."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu_shapes import train_config, write_checkpoint
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from qlora_trainer.loader import ensure_packed
from qlora_trainer.model import build_model
from qlora_trainer.optim import Optimizer
from qlora_trainer.peers import ENV_PEERS
from qlora_trainer.sharding import open_layer, packed_parameter, peers_of, shard_layer, shard_root
from qlora_trainer.sources import Source

FULL = {"sharding_strategy": "FULL_SHARD"}
NUM_MICRO, NUM_STEPS, NUM_BYTES = 4, 6, 1 << 26
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def train(
    folder: Path, training: dict[str, Any], mesh: DeviceMesh, first: int = 0, peers: bool = True
) -> dict[str, Any]:
    """Steps `first`..NUM_STEPS; at step 3 one rank's state is saved, and a `first` of 3 starts from it."""
    config = train_config(training={**training, "warmup_ratio": 0, "lr_scheduler": "constant", "learning_rate": 1e-3})
    os.environ[ENV_PEERS] = str(int(peers))
    base = Source(path=folder / "model", files=[], digest=folder.name)
    model = build_model(config, ensure_packed(config, base, folder, DEVICE), mesh, DEVICE, 1)
    model.verify()
    optimizer = Optimizer(config, model.adapter, WORLD_SIZE)
    state = folder / "state.pt"
    if first:
        optimizer.load_state({k: v.to(DEVICE) for k, v in torch.load(state).items()}, first)
    losses, norm = [], 0.0
    for step in range(first, NUM_STEPS):
        if step == 3 and WORLD_SIZE == 1:
            torch.save({k: v.cpu() for k, v in optimizer.state().items()}, state)
        tokens = torch.randint(4, 1024, (NUM_MICRO, 64), generator=torch.Generator().manual_seed(step % 2))
        optimizer.zero_grad()
        for micro in range(NUM_MICRO * RANK // WORLD_SIZE, NUM_MICRO * (RANK + 1) // WORLD_SIZE):
            model.set_step_seed(1, step, micro)
            rows = tokens[micro : micro + 1]
            loss = model.loss(rows, rows, None, NUM_MICRO * 63)
            loss.backward()
            optimizer.add_loss(loss)
        losses.append(optimizer.all_reduce()[0])
        norm = optimizer.step(step, NUM_STEPS)[0]
    model.verify()
    return {"losses": losses, "norm": norm, "peers": peers_of(model.layers[0]) is not None}


def wrong_bytes(mesh: DeviceMesh) -> dict[str, int]:
    """Bytes that differ after FSDP2's all-gather: as one bf16 parameter, and through this project's hooks."""
    raw = torch.randint(
        0, 256, (NUM_BYTES,), dtype=torch.uint8, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)
    )

    class AsBf16(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(raw.clone().view(torch.bfloat16), requires_grad=False)

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return (self.packed.view(torch.uint8) != raw).sum()

    class Hooks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = packed_parameter(raw.clone())

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return (open_layer(self) != raw).sum()

    naive, layer = AsBf16(), Hooks()
    ours = nn.Sequential(layer)
    fully_shard(naive, mesh=mesh)
    shard_layer(layer, mesh, "FULL_SHARD", False, False)
    shard_root(ours, [layer], mesh)
    nothing = torch.zeros(1, device=DEVICE)  # FSDP2's root wants an argument
    return {"bf16": int(max(naive(nothing) for _ in range(3))), "hooks": int(max(ours(nothing) for _ in range(3)))}


def main(folder: Path) -> None:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE)
    mesh = init_device_mesh("cuda", (WORLD_SIZE,))
    if WORLD_SIZE == 1:
        write_checkpoint(folder / "model", "tiny", 1)
        found = {"NO_SHARD": train(folder, {}, mesh)}
    else:
        found = {
            "wrong_bytes": wrong_bytes(mesh),
            "peers": train(folder, FULL, mesh),
            "peers, recomputed": train(folder, {**FULL, "gradient_checkpointing": "full"}, mesh),
            "FULL_SHARD": train(folder, FULL, mesh, peers=False),
            "SHARD_GRAD_OP": train(folder, {"sharding_strategy": "SHARD_GRAD_OP"}, mesh),
            "offload": train(folder, {**FULL, "cpu_offload": True}, mesh),
            "resumed": train(folder, FULL, mesh, first=3)["losses"],
        }
    if RANK == 0:
        (folder / f"world-{WORLD_SIZE}.json").write_text(json.dumps(found))
        print(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
