"""`make bench-gpu`: the references and this trainer in one run on two GPUs; prints and appends tables.

Random weights of real shapes, made on the device. Every figure is one line of benchmarks/gpu.jsonl (date, commit,
device, torch, name, value, unit, reference, reference_value) and one row of a dated table in benchmarks/results.md.
A reference whose libraries are missing (Unsloth) is left out and said so. Options: --skip-references, --skip-70b.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
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


@dataclass(frozen=True)
class Figure:
    """One row: `reference` is another system of this run, or "" when it was not run."""

    name: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None


class Bench:
    """Runs workers and collects what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, dict[str, Any]] = {}

    def environment(self, **extra: str) -> dict[str, str]:
        paths = [HERE, ROOT / "api/src", ROOT / "trainer-image/src", os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONWARNINGS": "ignore",
            "T0": repr(time.time()),
            **extra,
        }

    def run(self, command: list[str], out: Path, limit: int, **extra: str) -> None:
        """One worker group; its lines of JSON join the results (rank 0's, peaks of the worst rank)."""
        print("+", " ".join(command[-4:]), flush=True)
        log = out.with_suffix(".log")
        with open(log, "w") as stream:
            code = self._wait(command, stream, limit, self.environment(**extra))
        if code:
            print(f"failed with {code}:\n{log.read_text()[-1500:]}", flush=True)
        for line in out.read_text().splitlines() if out.exists() else []:
            result = json.loads(line)
            known = self.results.setdefault(result["name"], result)
            for key in ("peak_gib", "host_peak_gib", "load_s", "start_s", "load_peak_gib"):
                known[key] = max(known.get(key, 0), result.get(key, 0))
        print(json.dumps({n: _brief(r) for n, r in self.results.items()}), flush=True)

    def _wait(self, command: list[str], stream: Any, limit: int, environment: dict[str, str]) -> int:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=self.folder)
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def ours(self, name: str, cases: list[dict[str, Any]], gpus: int, limit: int = 240) -> None:
        file, out = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        file.write_text(json.dumps(cases))
        launch = [sys.executable]
        if gpus > 1:
            launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(gpus)]
        self.run([*launch, str(HERE / "gpu_worker.py"), str(file), str(out)], out, limit)

    def reference(self, name: str, model: Path, version: int, recompute: bool, steps: int) -> None:
        """TRL's SFTTrainer under FSDP1 or FSDP2, or (version 0) Unsloth on one card."""
        out = self.folder / f"{name}.jsonl"
        arguments = [str(model), str(out), str(steps), str(int(recompute))]
        script = str(HERE / "gpu_reference.py")
        if version == 0:
            command = [sys.executable, script, "unsloth", *arguments]
        else:
            config = self.folder / f"fsdp{version}.yaml"
            config.write_text(FSDP_YAML + (FSDP1 if version == 1 else FSDP2))
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), script, "hf"]
            command += arguments
        self.run(command, out, 200, REFERENCE_NAME=name)


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("tok_s", "peak_gib", "load_s", "start_s", "error") if key in result}


def case(name: str, size: str = "8b", steps: int = 12, **training: Any) -> dict[str, Any]:
    """A case of gpu_worker.py; `training` holds spec.training's fields, micro batch and length among them."""
    micro_batch, length = training.pop("micro_batch", 4), training.pop("length", 2048)
    quantization = {"type": training.pop("quantization", "nf4")}
    sections = {"training": {**training, "max_length": length}, "quantization": quantization}
    where = {"model_dir": size, "cache_dir": str(Path(size).parent / "cache")} if "/" in size else {"size": size}
    return {"name": name, **where, "micro_batch": micro_batch, "length": length, "steps": steps, "sections": sections}


def run_all(bench: Bench, references: bool, large: bool) -> None:
    model = bench.folder / "llama-8b"
    code = f"import pathlib, gpu_shapes; gpu_shapes.write_checkpoint(pathlib.Path({str(model)!r}), '8b')"
    subprocess.run([sys.executable, "-c", code], check=True, env=bench.environment())
    none, full, sharded = "none", "full", "FULL_SHARD"
    single = [
        case("single_fast", gradient_checkpointing=none, steps=16),
        case("single_bf16", gradient_checkpointing=none, quantization=none),
        case("single_lean", gradient_checkpointing=full),
    ]
    bench.ours("single", single, 1)
    if references:
        if importlib.util.find_spec("unsloth"):
            bench.reference("unsloth_fast", model, 0, False, 14)
            bench.reference("unsloth_lean", model, 0, True, 14)
        else:
            print("unsloth is not installed: its figures are left out")
        bench.reference("fsdp1", model, 1, True, 9)
        bench.reference("fsdp2", model, 2, False, 10)
    both = [
        case("8b_fast", gradient_checkpointing=none, sharding_strategy=sharded, steps=16),
        case("8b_grad_op", gradient_checkpointing=none, sharding_strategy="SHARD_GRAD_OP", steps=16),
        case("8b_lean", gradient_checkpointing=full, sharding_strategy=sharded),
    ]
    bench.ours("both", both, 2)
    for name in ("load_cold", "load_warm"):
        cold = case(name, str(model), 3, gradient_checkpointing=none, sharding_strategy=sharded)
        bench.ours(name, [{**cold, "warm": 2}], 2)
    if large:
        deep = {"gradient_checkpointing": full, "sharding_strategy": sharded, "micro_batch": 1, "steps": 7}
        cases = [
            case("70b_fast", "70b", **{**deep, "gradient_checkpointing": none}),
            case("70b_memory", "70b", length=1024, **deep),
            case("70b_offload", "70b", length=1024, cpu_offload=True, **deep),
        ]
        bench.ours("large", cases, 2, 300)


def figures(results: dict[str, dict[str, Any]]) -> list[Figure]:
    """The table's rows that were measured."""
    rows: list[Figure] = []

    def add(name: str, of: str, key: str, unit: str, reference: str = "", scale: float = 1.0) -> None:
        if key in results.get(of, {}):
            other = results.get(reference, {}).get(key)
            rows.append(Figure(name, round(results[of][key] * scale, 3), unit, reference if other else "", other))

    def ratio(name: str, of: str, by: str, unit: str = "ratio", cost: bool = False) -> None:
        if "tok_s" in results.get(of, {}) and "tok_s" in results.get(by, {}):
            value = results[of]["tok_s"] / results[by]["tok_s"]
            rows.append(Figure(name, round(100 * (1 - value) if cost else value, 3), unit, by, results[by]["tok_s"]))

    add("8b_fast", "8b_fast", "tok_s", "tok/s/GPU", "fsdp2")
    add("8b_fast_documented", "8b_fast", "tok_s", "tok/s/GPU", "fsdp1")
    add("8b_fast_memory", "8b_fast", "peak_gib", "GiB", "fsdp2")
    add("8b_grad_op", "8b_grad_op", "tok_s", "tok/s/GPU", "fsdp2")
    add("8b_lean", "8b_lean", "tok_s", "tok/s/GPU", "unsloth_lean")
    add("8b_lean_memory", "8b_lean", "peak_gib", "GiB", "unsloth_lean")
    ratio("8b_single", "single_fast", "unsloth_fast")
    add("8b_single_tokens", "single_fast", "tok_s", "tok/s/GPU", "unsloth_fast")
    add("8b_single_lean", "single_lean", "tok_s", "tok/s/GPU", "unsloth_lean")
    ratio("8b_sharding_cost", "8b_fast", "single_fast", "%", cost=True)
    ratio("8b_nf4_vs_bf16", "single_fast", "single_bf16")
    add("70b", "70b_fast", "tok_s", "tok/s/GPU")
    add("70b_peak", "70b_fast", "peak_gib", "GiB")
    add("70b_memory", "70b_memory", "peak_gib", "GiB")
    add("70b_memory_offload", "70b_offload", "peak_gib", "GiB")
    add("host_memory", "8b_fast", "host_peak_gib", "GiB")
    add("load_peak", "load_cold", "load_peak_gib", "GiB")
    add("load_seconds", "load_cold", "load_s", "s")
    add("load_seconds_cached", "load_warm", "load_s", "s")
    add("start_seconds", "load_warm", "start_s", "s", "fsdp1")
    return rows


def publish(rows: list[Figure], results: dict[str, dict[str, Any]]) -> None:
    """Append to gpu.jsonl and results.md, print the table."""
    import torch

    now = datetime.now(UTC)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    revision = commit.stdout.strip() or os.environ.get("COMMIT", "unknown")
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    common = {"date": now.strftime("%Y-%m-%d"), "commit": revision, "device": device, "torch": torch.__version__}
    with open(HERE / "gpu.jsonl", "a") as file:
        for row in rows:
            line = {**common, "name": row.name, "value": row.value, "unit": row.unit}
            file.write(json.dumps({**line, "reference": row.reference, "reference_value": row.reference_value}) + "\n")
    lines = [
        f"\n## GPU, {now:%Y-%m-%d %H:%M} UTC, {device}, torch {torch.__version__}, commit {revision}\n",
        "Llama 8B and 70B shapes, random weights, r = 16 on all linears, NF4 with double quantization, seq 2048, micro"
        " batch 4 (70B: 1).\n",
        "| figure | value | unit | reference of the same run | its value |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.name}` | {r.value} | {r.unit} | {r.reference or '-'} | {r.reference_value or '-'} |" for r in rows
    ]
    planned = [r for r in results.values() if "plan_gib" in r and "peak_gib" in r]
    lines += ["\n| memory plan | planned GiB | measured GiB | off by |", "|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {r['plan_gib']} | {r['peak_gib']} | {100 * (r['plan_gib'] / r['peak_gib'] - 1):+.1f} % |"
        for r in planned
    ]
    text = "\n".join(lines) + "\n"
    with open(HERE / "results.md", "a") as file:
        file.write(text)
    print(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-references", action="store_true")
    parser.add_argument("--skip-70b", action="store_true")
    parser.add_argument("--folder", type=Path, help="working folder (17 GB); default: a temporary one")
    options = parser.parse_args()
    import torch

    if torch.cuda.device_count() < 2:
        print("bench-gpu needs two CUDA GPUs", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.folder or Path(temporary))
        bench.folder.mkdir(parents=True, exist_ok=True)
        run_all(bench, not options.skip_references, not options.skip_70b)
        rows = figures(bench.results)
        publish(rows, bench.results)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
