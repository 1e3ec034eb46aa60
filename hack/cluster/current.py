"""CLUSTER=current: the cluster of the current kubectl context, and a registry that its nodes pull from.

Nothing is started or stopped there. kubectl is the one on the PATH where there is one, because a context may need its
plugins and its version; helm likewise when it is helm 4, else the pinned one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import build

_HOST = r"(localhost|[a-z0-9-]+(\.[a-z0-9-]+)+)(:\d+)?|[a-z0-9-]+:\d+"
_PATH = r"(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"


@dataclass(frozen=True)
class Registry:
    """Where images are pushed to: a host with an optional path, in plain HTTP or not."""

    prefix: str
    plain_http: bool = False

    @classmethod
    def given(cls) -> Registry:
        """The one of REGISTRY; ValueError when it is not set or can't be one."""
        text = os.environ.get("REGISTRY", "")
        if not text:
            raise ValueError(
                "CLUSTER=current needs REGISTRY=HOST/PATH, a registry that you may push to and the cluster's nodes "
                "pull from, for example REGISTRY=ghcr.io/me; http://HOST:PORT/PATH for one without TLS"
            )
        scheme, _, prefix = text.rpartition("://")
        prefix = prefix.rstrip("/")
        if scheme not in ("", "http", "https") or not re.fullmatch(f"({_HOST}){_PATH}", prefix):
            raise ValueError(
                f"REGISTRY={text}: write HOST/PATH in lower case, for example ghcr.io/me, docker.io/me or "
                "http://10.0.0.1:5000"
            )
        return cls(prefix, scheme == "http")


def client(name: str) -> Path:
    """kubectl or helm for the current context; built when the PATH has none that fits."""
    found = shutil.which(name)
    if found and (name != "helm" or _output(Path(found), "version", "--template", "{{.Version}}").startswith("v4.")):
        return Path(found)
    build.binaries(name)
    return build.program(name)


def status() -> dict[str, object]:
    """The current context, its API server and version, and the registry; ValueError when it does not answer."""
    kubectl = client("kubectl")
    done = subprocess.run(
        [kubectl, "version", "-o", "json", "--request-timeout=15s"], capture_output=True, text=True, check=False
    )
    version = json.loads(done.stdout or "{}").get("serverVersion", {}).get("gitVersion")
    if done.returncode or not version:
        raise ValueError(
            "CLUSTER=current: kubectl reaches no cluster. Choose one with KUBECONFIG or `kubectl config use-context`. "
            f"It said: {done.stderr.strip()}"
        )
    return {
        "name": "current",
        "context": _output(kubectl, "config", "current-context") or None,
        "api": _output(kubectl, "config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}") or None,
        "version": version,
        "registry": os.environ.get("REGISTRY"),
    }


def require() -> dict[str, object]:
    """The status of a cluster that answers, with a REGISTRY that can be one: said now rather than after minutes.

    Raises ValueError with what is missing.
    """
    found = status()
    Registry.given()
    return found


def _output(program: Path, *words: str) -> str:
    """What it prints, empty when it fails: inside a pod kubectl has a cluster, but no context."""
    return subprocess.run([program, *words], capture_output=True, text=True, check=False).stdout.strip()
