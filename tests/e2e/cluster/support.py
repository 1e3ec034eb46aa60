"""What the tests of the local cluster share: waiting, kubectl in their namespace, and a pod that serves HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hack.cluster.settings import Cluster

NAMESPACE = "cluster-test"
SERVER = "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"


def eventually(what: str, check: Callable[[], Any], timeout: float = 90) -> Any:
    """The first true value of `check`; fails with `what` when there is none in time."""
    deadline = time.monotonic() + timeout
    while not (value := check()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.5)
    return value


class Kubectl:
    def __init__(self, cluster: Cluster) -> None:
        self.prefix = [sys.executable, "-m", "hack.cluster", "--name", cluster.name, "kubectl", "-n", NAMESPACE]

    def run(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.prefix, *words], check=False, input=stdin, capture_output=True, text=True)

    def __call__(self, *words: str, stdin: str | None = None) -> str:
        done = self.run(*words, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def create(self, *objects: dict[str, Any]) -> None:
        self("create", "-f", "-", stdin="\n---\n".join(json.dumps(item) for item in objects))

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return json.loads(self("get", kind, name, "-o", "json"))

    def python(self, pod: str, code: str) -> str:
        return self("exec", pod, "--", "python", "-c", code).strip()

    def attempt(self, pod: str, code: str) -> str | None:
        try:
            return self.python(pod, code)
        except AssertionError:
            return None

    def ready(self, pod: str) -> bool:
        conditions = self.get("pod", pod)["status"].get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    def ready_at_last(self, manifest: dict[str, Any]) -> bool:
        """Whether this pod is Ready; one that a kubelet refused while its device plugin was away is made anew."""
        name = manifest["metadata"]["name"]
        if self("get", "pod", name, "--ignore-not-found", "-o", "jsonpath={.status.phase}") in ("", "Failed"):
            self("delete", "pod", name, "--ignore-not-found")
            self.create(manifest)
        return self.ready(name)


def pod(name: str, image: str, on: int, gpus: int = 1, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": image,
        "command": ["python", "-c", SERVER],
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        "resources": {"limits": {"memory": "64Mi", "cpu": "100m"} | ({"nvidia.com/gpu": gpus} if gpus else {})},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    container["volumeMounts"] = [
        {"name": item["name"], "mountPath": "/" + item["name"]} for item in spec.get("volumes", [])
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": f"node{on}"},
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            **spec,
        },
    }
