"""The GPU device plugin's environment: a Python with grpcio and the protocol's generated modules, kept in the cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from .. import build
from ..progress import step
from ..settings import CACHE

RESOURCE = "nvidia.com/gpu"
_HERE = Path(__file__).resolve().parent
_PROTOCOL = _HERE / "deviceplugin.proto"
_REQUIREMENTS = ("grpcio>=1.80,<2", "grpcio-tools>=1.80,<2")


def _folder() -> Path:
    digest = hashlib.sha256(_PROTOCOL.read_bytes() + repr((_REQUIREMENTS, sys.version_info[:2])).encode())
    return CACHE / "device-plugin" / digest.hexdigest()[:16]


def prepare() -> None:
    """Installs grpcio and generates the modules where that is not done yet."""
    folder = _folder()
    if (folder / "deviceplugin_pb2_grpc.py").exists():
        return
    with step("preparing the GPU device plugin"):
        python = build.venv(folder / "venv", *_REQUIREMENTS)
        output = [f"--proto_path={_HERE}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
        subprocess.run([str(python), "-m", "grpc_tools.protoc", *output, _PROTOCOL.name], check=True)


def command(count: int, unhealthy_file: Path) -> list[str]:
    """What runs the plugin with `count` devices; those named in the file are unhealthy."""
    python = str(_folder() / "venv" / "bin" / "python")
    return [python, str(_HERE / "plugin.py"), str(count), str(unhealthy_file)]


def environment() -> dict[str, str]:
    """What the plugin needs in its environment: where the protocol's modules are."""
    return {"PYTHONPATH": str(_folder())}
