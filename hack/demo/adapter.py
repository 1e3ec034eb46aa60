"""What the run left in the bucket, taken for what it is: fetched, checked against its manifest, loaded with peft."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# bitsandbytes, which peft imports, wants `pip install kernels` for a CPU kernel that nothing here calls
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

PROMPTS = ("violin", "generous", "whisper", "harbour")


@dataclass(frozen=True)
class Samples:
    """What the model says to a word, without and with the adapter."""

    word: str
    before: str
    after: str


def fetch(client: "S3Client", uri: str, folder: Path) -> list[Path]:
    """Download everything below an s3:// URI into the folder; the files."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    files = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix.rstrip("/") + "/"):
        for item in page.get("Contents", []):
            path = folder / item["Key"].removeprefix(prefix).lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, item["Key"], str(path))
            files.append(path)
    return files


def read_manifest(client: "S3Client", uri: str) -> dict[str, Any]:
    """The run's manifest."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    manifest: dict[str, Any] = json.loads(client.get_object(Bucket=bucket, Key=key)["Body"].read())
    return manifest


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(model_folder: Path, adapter_folder: Path, num_tokens: int = 24) -> list[Samples]:
    """Greedy answers of the base model and of the same model with the adapter, loaded with peft on the CPU."""
    import torch  # seconds to import: only when there is an adapter
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # beside a busy cluster two threads wait for each other at every token
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter_folder).eval()

    def answer(word: str) -> str:
        inputs = tokenizer(f"Define: {word}\n", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        text = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return " ".join(text.split())

    samples = []
    for word in PROMPTS:
        after = answer(word)
        with model.disable_adapter():
            samples.append(Samples(word, answer(word), after))
    return samples
