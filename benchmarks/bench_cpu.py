"""`make bench`: tokens a second and peak memory on the CPU against TRL's SFTTrainer over peft and bitsandbytes.

Same model (SmolLM2-135M's shape with random weights, or --model FOLDER), data and adapter, one process each, one after
the other, twice, in turns; the better of each side's runs counts. The last line is JSON: ratio, tokens_per_second,
reference_tokens_per_second, memory_ratio. Fails when the first losses differ: then it was not the same training.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def write_smollm2(folder: Path) -> None:
    """A random checkpoint of SmolLM2-135M's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(side: str, folder: Path, steps: int, length: int) -> dict[str, Any]:
    """One run of one side in a fresh process."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "BENCH_LENGTH": str(length)}
    command = [sys.executable, str(HERE / "cpu_worker.py"), side, str(folder), str(steps)]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if output.returncode:
        raise RuntimeError(f"{side} failed:\n{output.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(output.stdout.strip().splitlines()[-1])
    print(side, json.dumps(result), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a causal LM in safetensors")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary) / "model"
        if options.model is None:
            write_smollm2(folder)
        sizes = (folder, options.steps, options.length)
        rounds = [(run("ours", *sizes), run("trl", *sizes)) for _ in range(options.rounds)]
    ours, reference = zip(*rounds, strict=True)
    difference = abs(ours[0]["first_loss"] - reference[0]["first_loss"])
    if difference > 0.02 * abs(reference[0]["first_loss"]):
        print(f"the first losses differ by {difference:.4f}: not the same training", file=sys.stderr)
        return 1
    fastest, other = (max(side, key=lambda r: r["tokens_per_second"]) for side in (ours, reference))
    summary = {
        "ratio": round(fastest["tokens_per_second"] / other["tokens_per_second"], 3),
        "tokens_per_second": round(fastest["tokens_per_second"], 1),
        "reference_tokens_per_second": round(other["tokens_per_second"], 1),
        "memory_ratio": round(max(r["peak_bytes"] for r in ours) / max(r["peak_bytes"] for r in reference), 3),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
