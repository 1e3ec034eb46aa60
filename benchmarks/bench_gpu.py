"""`make bench-gpu`: the references and this trainer in one run on two GPUs, or one; prints, appends tables.

Random weights of real shapes, made on the device. Every figure is one line of benchmarks/gpu.jsonl (date, commit,
device, torch, name, value, unit, reference, reference_value) and one row of a dated table in benchmarks/results.md.
A reference whose libraries are missing (Unsloth) is left out and said so. Options: --groups, --folder.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_table import figures, publish

HERE = Path(__file__).parent
ROOT = HERE.parent
UNSLOTH_PATH = os.environ.get("UNSLOTH_PATH", "")  # Unsloth's packages, where they are not beside ours
FSDP_YAML = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
machine_rank: 0
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
main_training_function: main
use_cpu: false
"""
FSDP1 = """mixed_precision: 'no'
fsdp_config:
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_backward_prefetch: BACKWARD_PRE
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_sharding_strategy: FULL_SHARD
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_sync_module_states: true
  fsdp_use_orig_params: false
"""
FSDP2 = """mixed_precision: bf16
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: false
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""


PEAKS = ("peak_gib", "host_peak_gib", "load_s", "start_s", "load_peak_gib")


class Bench:
    """Runs workers and collects what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []  # groups of workers, and cases

    def environment(self, **extra: str) -> dict[str, str]:
        paths = [HERE, ROOT, ROOT / "api/src", ROOT / "trainer-image/src", os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONWARNINGS": "ignore",
            "T0": repr(time.time()),
            **extra,
        }

    def run(self, command: list[str], out: Path, limit: int, gpus: int = 1, **extra: str) -> None:
        """One group of workers; its lines of JSON join the results (rank 0's, peaks of the worst rank)."""
        print("+", " ".join(command[-4:]), flush=True)
        log = out.with_suffix(".log")
        with open(log, "w") as stream:
            codes = self._wait(command, stream, limit, gpus, self.environment(**extra))
        if any(codes):
            print(f"failed with {codes}:\n{log.read_text()[-1500:]}", flush=True)
            self.failed.append(out.stem)
        for line in out.read_text().splitlines() if out.exists() else []:
            result = json.loads(line)
            self.results[result["name"]] = joined(self.results.get(result["name"], {}), result)
            if "error" in result:
                self.failed.append(result["name"])
        print(json.dumps({n: _brief(r) for n, r in self.results.items()}), flush=True)

    def _wait(self, command: list[str], stream: Any, limit: int, gpus: int, environment: dict[str, str]) -> list[int]:
        """One process a GPU, as an agent starts its workers; their exit codes."""
        group = {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        processes = []
        for rank in range(gpus):
            own = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if gpus > 1 else {}
            options: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT, "cwd": self.folder}
            processes.append(subprocess.Popen(command, env=environment | own, **options))
        end = time.monotonic() + limit
        while time.monotonic() < end and all(process.poll() is None for process in processes):
            time.sleep(0.2)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # the others of a group end with it
            process.kill()
        return [process.wait() for process in processes]

    def ours(self, name: str, cases: list[dict[str, Any]], gpus: int, limit: int = 240) -> None:
        file, out = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        file.write_text(json.dumps(cases))
        self.run([sys.executable, str(HERE / "gpu_worker.py"), str(file), str(out)], out, limit, gpus)

    def recovery(self, model: Path) -> None:
        out = self.folder / "recovery.jsonl"
        command = [sys.executable, str(HERE / "gpu_recovery.py"), str(model), str(self.folder / "recovery"), str(out)]
        self.run(command, out, 200)

    def reference(self, name: str, model: Path, version: int, recompute: bool, steps: int) -> None:
        """TRL's SFTTrainer under FSDP1 or FSDP2, or (version 0) Unsloth on one card."""
        out = self.folder / f"{name}.jsonl"
        arguments = [str(model), str(out), str(steps), str(int(recompute))]
        script = str(HERE / "gpu_reference.py")
        extra = {"REFERENCE_NAME": name}
        if version == 0:
            command = [sys.executable, script, "unsloth", *arguments]
            extra["PYTHONPATH"] = os.pathsep.join([UNSLOTH_PATH, self.environment()["PYTHONPATH"]])
        else:
            config = self.folder / f"fsdp{version}.yaml"
            config.write_text(FSDP_YAML + (FSDP1 if version == 1 else FSDP2))
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), script, "hf"]
            command += arguments
        self.run(command, out, 200, **extra)


def joined(known: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What is known of a case with one more rank's result: rank 0's figures, peaks of the worst rank, any error."""
    peaks = {key: max(r[key] for r in (known, result) if key in r) for key in PEAKS if key in {*known, *result}}
    first, other = (known, result) if known and result.get("rank", 0) else (result, known)
    error = {"error": other["error"]} if "error" in other else {}
    return {**error, **first, **peaks}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("tok_s", "peak_gib", "load_s", "start_s", "error") if key in result}


def case(name: str, size: str = "8b", steps: int = 12, **training: Any) -> dict[str, Any]:
    """A case of gpu_worker.py; `training` holds spec.training's fields, micro batch and length among them."""
    micro_batch, length = training.pop("micro_batch", 4), training.pop("length", 2048)
    quantization, peers = {"type": training.pop("quantization", "nf4")}, training.pop("peers", "1")
    sections = {"training": {**training, "max_length": length}, "quantization": quantization}
    where = {"model_dir": size, "cache_dir": str(Path(size).parent / "cache")} if "/" in size else {"size": size}
    shape = {"micro_batch": micro_batch, "length": length, "steps": steps}
    return {"name": name, **where, **shape, "peers": peers, "sections": sections}


REFERENCES = ("unsloth_fast", "unsloth_lean", "fsdp1", "fsdp2")
ONE_GPU = ("unsloth_fast", "unsloth_lean", "single")
GROUPS = (*REFERENCES, "single", "both", "load", "recovery", "large")
FAST = {"gradient_checkpointing": "none"}
LEAN = {"gradient_checkpointing": "full"}
SHARDED = {"sharding_strategy": "FULL_SHARD"}


def run_all(bench: Bench, groups: list[str]) -> None:
    model = bench.folder / "llama-8b"
    code = f"import pathlib, gpu_shapes; gpu_shapes.write_checkpoint(pathlib.Path({str(model)!r}), '8b')"
    subprocess.run([sys.executable, "-c", code], check=True, env=bench.environment())
    real = str(model)
    run_references(bench, model, groups)
    if "single" in groups:
        single = [
            {**case("single_fast", real, **FAST, steps=16), "profile": True},
            case("single_bf16", **FAST, quantization="none"),
            case("single_lean", real, **LEAN),
        ]
        bench.ours("single", single, 1)
    if "both" in groups:
        both = [
            {**case("8b_fast", real, **FAST, **SHARDED, steps=16), "profile": True},
            case("8b_fsdp2", real, **FAST, **SHARDED, steps=16, peers="0"),
            case("8b_lean", real, **LEAN, **SHARDED),
        ]
        bench.ours("both", both, 2)
    if "load" in groups:
        shutil.rmtree(bench.folder / "cache", ignore_errors=True)
    for name in ("load_cold", "load_warm") if "load" in groups else ():
        bench.ours(name, [{**case(name, real, 3, **FAST, **SHARDED), "warm": 2}], 2)
    if "recovery" in groups:
        bench.recovery(model)
    if "large" in groups:
        deep = {**SHARDED, "micro_batch": 1, "steps": 7}
        cases = [
            case("70b_fast", "70b", **FAST, **deep),
            case("70b_memory", "70b", length=1024, **LEAN, **deep),
            case("70b_offload", "70b", length=1024, cpu_offload=True, **LEAN, **deep),
        ]
        bench.ours("large", cases, 2, 300)


def run_references(bench: Bench, model: Path, groups: list[str]) -> None:
    """Unsloth on one card, TRL's SFTTrainer under FSDP1 (the documented recipe) and FSDP2."""
    installed = importlib.util.find_spec("unsloth") or UNSLOTH_PATH
    for name in REFERENCES:
        if name not in groups:
            continue
        if name.startswith("unsloth") and not installed:
            print("unsloth is not installed: its figures are left out")
        elif name.startswith("unsloth"):
            bench.reference(name, model, 0, name == "unsloth_lean", 14)
        else:
            bench.reference(name, model, int(name[-1]), name == "fsdp1", 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default=",".join(GROUPS), help="which to run, with commas between (default: all)")
    parser.add_argument("--folder", type=Path, help="working folder (17 GB); default: a temporary one")
    options = parser.parse_args()
    import torch

    groups = options.groups.split(",")
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no groups: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    wanted, found = 1 if set(groups) <= set(ONE_GPU) else 2, torch.cuda.device_count()
    if found < wanted:
        print(
            f"needs {wanted} CUDA GPUs, found {found}; one is enough for --groups {','.join(ONE_GPU)}", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.folder or Path(temporary))
        bench.folder.mkdir(parents=True, exist_ok=True)
        run_all(bench, groups)
        rows = figures(bench.results)
        publish(rows, bench.results)
        if bench.failed:
            print(f"failed: {', '.join(dict.fromkeys(bench.failed))}; the logs are above", file=sys.stderr)
    return 0 if rows and not bench.failed else 1


if __name__ == "__main__":
    sys.exit(main())
