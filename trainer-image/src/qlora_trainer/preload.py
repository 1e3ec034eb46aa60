"""Imported once by the fork server: workers are forked with all of this in memory, in milliseconds.

Rules: imports only; nothing here may start a thread or touch a GPU (a CUDA context does not survive a fork).
`torch._dynamo` belongs here because torch imports it, for seconds, at the first exception that it logs.
"""

# ruff: noqa: E402
import gc

gc.disable()  # imports make a million objects that stay: looking through them over and over took a quarter of the time

import importlib
import logging
import os

import torch

from qlora_trainer.control import has_gpu
from qlora_trainer.workers import DEFAULT_WORKER, ENV_WORKER, die_with_parent

die_with_parent()
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() without a CUDA context
# bitsandbytes wants `pip install kernels` for a CPU kernel that the trainer never calls; its other words are heard
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

_OURS = ("qlora_trainer.pod_agent", os.environ.get(ENV_WORKER, DEFAULT_WORKER).partition(":")[0])
_IN_USE = ("torch._dynamo", "transformers", "accelerate")  # else imported when needed
_AUTO = tuple(f"transformers.models.auto.{name}" for name in ("tokenization_auto", "modeling_auto", "auto_factory"))
_CPU_ONLY = ("peft", "bitsandbytes")  # where there is a GPU, bitsandbytes asks it for its capability: a CUDA context
_GPU_ONLY = ("torch._inductor.compile_fx", "qlora_trainer.kernels", "transformers.integrations.sdpa_attention")
for _name in (*_OURS, *_IN_USE, *_AUTO, *(_GPU_ONLY if has_gpu() else _CPU_ONLY)):
    importlib.import_module(_name)
assert not torch.cuda.is_initialized(), "a preloaded module made a CUDA context: forked workers could not use the GPU"
gc.freeze()  # a collection in a forked process would touch, and so copy, every page of what is shared
gc.enable()
