"""One rank of the GPU benchmark: builds and trains each case of CASES (a JSON file), appends a line of JSON a case.

Run by bench_gpu.py, a process a GPU. The clock of `start_seconds` starts at T0 (environment; seconds since the epoch).
"""

# ruff: noqa: F401, I001
import qlora_trainer.preload  # first: so does the process that workers are forked from

import contextlib
import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_shapes import RandomPacked, random_packed, train_config
from torch.distributed.device_mesh import init_device_mesh

from qlora_api.run import TrainConfig
from qlora_trainer.loader import PackedModel, ensure_packed
from qlora_trainer.model import TrainableModel, build_model
from qlora_trainer.optim import Optimizer
from qlora_trainer.peers import ENV_PEERS
from qlora_trainer.quant import Scheme
from qlora_trainer.sharding import peers_of
from qlora_trainer.sources import Source

T0 = float(os.environ["T0"])
IMPORTED = time.time() - T0
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if CUDA else torch.device("cpu")
GIB = 2**30


def anonymous_gib() -> float:
    """Anonymous host memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples this process' anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gib = 0.0

    def run(self) -> None:
        while True:
            self.gib = max(self.gib, anonymous_gib())
            time.sleep(0.05)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def step(model: TrainableModel, optimizer: Optimizer, case: dict[str, Any], number: int) -> float:
    """One optimizer step over one micro batch of random tokens a rank."""
    shape = (case["micro_batch"], case["length"])
    generator = torch.Generator().manual_seed(number * WORLD_SIZE + RANK)
    ids = torch.randint(4, model.hf_config.vocab_size, shape, generator=generator)
    optimizer.zero_grad()
    model.set_step_seed(1, number, RANK)
    loss = model.loss(ids, ids, None, WORLD_SIZE * shape[0] * (shape[1] - 1))
    loss.backward()
    optimizer.add_loss(loss)
    total, _ = optimizer.all_reduce()
    optimizer.step(number, 1000)
    return total


def run_case(case: dict[str, Any], peak: Peak) -> dict[str, Any]:
    """Build the case's model, train it for its steps; what was measured, under this rank."""
    result: dict[str, Any] = {"name": case["name"], "rank": RANK, "world_size": WORLD_SIZE}
    result |= {"imported_s": round(IMPORTED, 2), "ready_s": round(time.time() - T0, 2)}
    config = train_config(**case.get("sections", {}))
    peak.gib = 0.0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    model, shared, loaded = load(case, config, peak)
    optimizer = Optimizer(config, model.adapter, WORLD_SIZE)
    result |= loaded | train(case, model, optimizer, shared) | {"host_peak_gib": round(peak.gib, 2)}
    if case.get("profile"):
        result["profile"] = profile(lambda: step(model, optimizer, case, 999))
    return result


def load(case: dict[str, Any], config: TrainConfig, peak: Peak) -> tuple[TrainableModel, int, dict[str, Any]]:
    """The case's model, bytes of it that torch does not count, and what loading took."""
    begun = time.time()
    packed = packed_of(case, config)
    mesh = init_device_mesh(DEVICE.type, (WORLD_SIZE,)) if WORLD_SIZE > 1 or case.get("mesh") else None
    os.environ[ENV_PEERS] = case.get("peers", "1")
    model = build_model(config, packed, mesh, DEVICE, case["micro_batch"])
    if isinstance(packed, RandomPacked):
        packed.forget()
    synchronize()
    peers = peers_of(model.layers[0])
    shared = peers.base.uncounted_bytes if peers is not None else 0
    plan = model.plan
    result = {"peers": peers is not None, "plan_gib": round(plan.gpu_bytes / GIB, 3), "sharding": plan.sharding}
    result["plan"] = {item: round(size / GIB, 3) for item, size in plan.gpu.items()}
    result |= {"load_s": round(time.time() - begun, 2), "host_gib": round(peak.gib, 2)}
    if CUDA:
        result["load_peak_gib"] = round((torch.cuda.max_memory_allocated() + shared) / GIB, 2)
        result["loaded_gib"] = round((torch.cuda.memory_allocated() + shared) / GIB, 2)
    if "model_dir" in case:
        begun = time.time()
        model.verify()
        result["verify_s"] = round(time.time() - begun, 2)
    return model, shared, result


def packed_of(case: dict[str, Any], config: TrainConfig) -> PackedModel:
    """The case's base: of a checkpoint on disk, or drawn bytes of a shape."""
    if "model_dir" in case:
        base = Source(path=Path(case["model_dir"]), files=[], digest=case["model_dir"])  # hashing is not measured
        return ensure_packed(config, base, Path(case["cache_dir"]), DEVICE)
    quantization = config.spec.quantization
    scheme = Scheme(quantization.type, quantization.double_quant, torch.bfloat16)
    return random_packed(case["size"], scheme, DEVICE, case.get("num_layers"))


def train(case: dict[str, Any], model: TrainableModel, optimizer: Optimizer, shared: int) -> dict[str, Any]:
    """The case's steps: the first one, the median of the warm ones, memory."""
    begun = time.time()
    first = last = step(model, optimizer, case, 0)
    synchronize()
    result: dict[str, Any] = {}
    if CUDA:
        result["first_peak_gib"] = round((torch.cuda.max_memory_allocated() + shared) / GIB, 2)
    result |= {"first_step_s": round(time.time() - begun, 2), "start_s": round(time.time() - T0, 2)}
    durations = []
    for number in range(1, case["steps"]):
        if number == case.get("warm", 4) and CUDA:
            torch.cuda.reset_peak_memory_stats()
        begun = time.time()
        last = step(model, optimizer, case, number)
        synchronize()
        durations.append(time.time() - begun)
    steady = sorted(durations[case.get("warm", 4) - 1 :])
    median = steady[len(steady) // 2]
    tokens = case["micro_batch"] * case["length"]
    result |= {"step_s": round(median, 4), "min_s": round(steady[0], 4), "tok_s": round(tokens / median, 1)}
    result |= {"loss": round(first, 4), "last_loss": round(last, 4), "host_steady_gib": round(anonymous_gib(), 2)}
    if CUDA:
        result["peak_gib"] = round((torch.cuda.max_memory_allocated() + shared) / GIB, 3)
        result["reserved_gib"] = round((torch.cuda.max_memory_reserved() + shared) / GIB, 3)
    return result


def profile(run: Any) -> dict[str, Any]:
    """Kernels of one step by their time in ms."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        begun = time.time()
        run()
        synchronize()
        wall = time.time() - begun
    events = [e for e in profiler.key_averages() if e.device_type.name == "CUDA" and e.self_device_time_total > 0]
    skipped = ("FSDP", "nccl:", "Torch-Compiled", "## ", "FullySh", "Profiler")
    rows = sorted(
        ((e.self_device_time_total / 1e3, e.count, e.key[:100]) for e in events if not e.key.startswith(skipped)),
        reverse=True,
    )
    top = [(round(ms, 2), count, key) for ms, count, key in rows[:40]]
    total = round(sum(row[0] for row in rows), 1)
    return {"wall_s": round(wall, 4), "kernel_ms": total, "top": top, **gaps(profiler)}


def gaps(profiler: Any) -> dict[str, Any]:
    """Where the GPU does nothing: all idle ms between kernels, and the longest pauses with the kernels around them."""
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name[:60])
        for e in profiler.events()
        if e.device_type.name == "CUDA"
        and not e.name.startswith(("FSDP", "nccl:", "Torch-Compiled", "##", "Profiler", "FullySh"))
    )
    pauses, end, before = [], spans[0][1], spans[0][2]
    for start, stop, name in spans[1:]:
        if start > end:
            pauses.append(((start - end) / 1e3, before, name, round((start - spans[0][0]) / 1e3, 1)))
        if stop > end:
            end, before = stop, name
    return {"idle_ms": round(sum(p[0] for p in pauses), 2), "span_ms": round((end - spans[0][0]) / 1e3, 1),
            "pauses": sorted(pauses, reverse=True)[:15]}  # fmt: skip


def main(cases_file: str, out: str) -> None:
    if CUDA:
        torch.cuda.set_device(DEVICE)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if CUDA else "gloo", **({"device_id": DEVICE} if CUDA else {}))
    peak = Peak()
    peak.start()
    for case in json.loads(Path(cases_file).read_text()):
        try:
            result = run_case(case, peak)
        except torch.OutOfMemoryError as error:
            result = {"name": case["name"], "rank": RANK, "error": str(error)[:300]}
        with open(out, "a") as file:
            file.write(json.dumps(result) + "\n")
        if RANK == 0:
            print(json.dumps({k: v for k, v in result.items() if k != "profile"}), flush=True)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        if case.get("reset", True):
            torch._dynamo.reset()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
