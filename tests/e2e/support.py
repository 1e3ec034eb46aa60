"""What the tests on the real cluster share: a namespace to work in, and a run that was applied and is followed."""

import json
from dataclasses import dataclass
from typing import Any

from hack.demo import upload, watch
from hack.demo.kubectl import ROOT, Kubectl, Manifest

EXAMPLES = ROOT / "examples"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


def fresh_namespace(kubectl: Kubectl, store: upload.Store) -> Kubectl:
    """kubectl's namespace anew, restricted, with the store's Secret."""
    kubectl.must("delete", "namespace", kubectl.namespace, "--ignore-not-found", "--timeout=120s")
    metadata = {"name": kubectl.namespace, "labels": RESTRICTED}
    kubectl.must("create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}))
    upload.give_access(kubectl, store)
    return kubectl


@dataclass(frozen=True)
class Applied:
    """A run that was applied and is followed."""

    kubectl: Kubectl
    name: str
    followed: watch.RunWatch

    def until(self, what: str, check: Any, timeout: float = 300) -> watch.Run:
        """The first state that passes; fails the test when the run fails or time is over."""
        return self.followed.until(what, check, timeout, tell=lambda run: None)

    def succeeded(self, timeout: float = 300) -> watch.Run:
        """The run at its good end."""
        return self.until("success", lambda run: watch.word(run) == "Succeeded", timeout)

    def pods(self) -> list[Manifest]:
        """The run's pods, those that are being deleted included."""
        return self.kubectl.list("pods", f"qlora.dev/run={self.name}")

    def without_pods(self, timeout: int = 120) -> None:
        """Wait until the last pod is gone, and its GPU with it."""
        self.kubectl.must("wait", "--for=delete", "pods", "-l", f"qlora.dev/run={self.name}", f"--timeout={timeout}s")
        assert self.pods() == []
