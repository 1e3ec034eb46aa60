"""A registry beside the cluster, started only when asked for: what CLUSTER=current is tried with on one machine.

It is CNCF's distribution on the control plane's address, reached by the host and the nodes alike; plain HTTP, no login,
so the nodes' containerd is told of it. It ends with the cluster, and its images go with the cluster's folder.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

from . import build, namespaces
from .progress import step, wait_for
from .settings import Cluster

PORT = 5000


def hosts(cluster: Cluster) -> Path:
    """The folder in which containerd looks up how to speak to a registry."""
    return cluster.dir / "certs.d"


def ensure(cluster: Cluster, outer: int) -> str:
    """Starts the registry unless it runs; returns what REGISTRY begins with."""
    build.binaries("registry")
    address = f"{cluster.control_plane}:{PORT}"
    url = f"http://{address}"
    told = hosts(cluster) / address
    told.mkdir(parents=True, exist_ok=True)
    (told / "hosts.toml").write_text(f'server = "{url}"\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n')
    program = build.program("registry")
    if not namespaces.runs(outer, f"{program} serve"):
        config = cluster.dir / "registry.json"  # JSON is YAML, which the registry reads
        config.write_text(
            json.dumps(
                {
                    "version": 0.1,
                    "storage": {"filesystem": {"rootdirectory": str(cluster.dir / "registry")}},
                    "http": {"addr": address},
                }
            )
        )
        environment = {"PATH": build.path_variable(), "OTEL_TRACES_EXPORTER": "none"}
        namespaces.start(outer, [program, "serve", config], cluster.dir / "log" / "registry.log", environment)
        with step("registry ready"):
            wait_for("registry", lambda: _answers(url), 30)
    return url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
