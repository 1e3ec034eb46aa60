"""The GPU table: which figure comes from which case, and where it is written down."""

import json
import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """One row: `reference` is another system of this run, or "" when it was not run."""

    name: str
    value: float
    unit: str
    reference: str = ""
    reference_value: float | None = None


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
    if "fsdp1" in results:
        add("8b_fast_documented", "8b_fast", "tok_s", "tok/s/GPU", "fsdp1")
    add("8b_fast_memory", "8b_fast", "peak_gib", "GiB", "fsdp2")
    add("8b_fsdp2_gather", "8b_fsdp2", "tok_s", "tok/s/GPU", "fsdp2")
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
    add("recovery_restart", "recovery", "restart_s", "s")
    add("recovery_in_process", "recovery", "in_process_s", "s")
    add("grow_pause", "recovery", "grow_pause_s", "s")
    add("save_stall", "recovery", "save_stall_s", "ms", scale=1000)
    add("save_durable", "recovery", "save_durable_s", "s")
    return rows


def publish(rows: list[Figure], results: dict[str, dict[str, Any]]) -> None:
    """Append to gpu.jsonl and results.md, print the table."""
    import torch

    now = datetime.now(UTC)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    revision = commit.stdout.strip() or os.environ.get("COMMIT", "unknown")
    device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    common = {"date": now.strftime("%Y-%m-%dT%H:%MZ"), "commit": revision, "device": device, "torch": torch.__version__}
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
