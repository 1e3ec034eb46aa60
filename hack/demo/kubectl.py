"""kubectl as a person runs it, for the demo and the tests: manifests in, exit status, text and JSON out."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Manifest = dict[str, Any]


def is_local() -> bool:
    """Whether CLUSTER means the local cluster, as `hack.cluster` reads it."""
    return os.environ.get("CLUSTER", "local") != "current"


def cluster(*words: str, name: str | None = None, quiet: bool = True) -> str:
    """Run one command of `hack.cluster`; its standard output. One that is named is a local cluster, always.

    Raises:
        RuntimeError: the command failed, with what it said.
    """
    command = [sys.executable, "-m", "hack.cluster", *(("--name", name) if name else ()), *words]
    errors = subprocess.PIPE if quiet else None
    environment = {**os.environ, **({"CLUSTER": "local"} if name else {})}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed: {done.stderr or 'see above'}")
    return done.stdout.strip()


@functools.cache
def program(name: str) -> str:
    """Path of kubectl or helm of the pinned version, built on first use."""
    return cluster("path", name)


@dataclass(frozen=True)
class Kubectl:
    """kubectl with a kubeconfig (None: the current context) and a namespace."""

    kubeconfig: Path | None
    namespace: str = "default"

    @classmethod
    def find(cls, namespace: str) -> "Kubectl":
        """The local cluster's kubectl or, with CLUSTER=current, the one of the current context."""
        if is_local():
            return cls(Path(json.loads(cluster("status"))["kubeconfig"]), namespace)
        return cls(None, namespace)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **({"KUBECONFIG": str(self.kubeconfig)} if self.kubeconfig else {})}

    def run(self, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """One call; never raises for a refusal: look at returncode, stdout and stderr."""
        command = [program("kubectl"), "--namespace", self.namespace, *words]
        return subprocess.run(command, env=self.environment, input=stdin, capture_output=True, text=True, check=False)

    def must(self, *words: str, stdin: str | None = None) -> str:
        """One call that has to succeed; its standard output.

        Raises:
            RuntimeError: kubectl's own words.
        """
        done = self.run(*words, stdin=stdin)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, manifest: Manifest, *flags: str) -> subprocess.CompletedProcess[str]:
        """`kubectl apply -f -`; a refusal is in the answer, not an exception."""
        return self.run("apply", "-f", "-", *flags, stdin=json.dumps(manifest))

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, or None when there is none.

        Raises:
            RuntimeError: the API server gave another answer than yes or no.
        """
        text = self.must("get", kind, name, "--ignore-not-found", "-o", "json")
        return json.loads(text) if text else None

    def list(self, kind: str, selector: str = "") -> list[Manifest]:
        """The namespace's objects of a kind."""
        items: list[Manifest] = json.loads(self.must("get", kind, "-l", selector, "-o", "json"))["items"]
        return items

    def helm(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One call of helm against the same cluster; never raises for a refusal."""
        command = [program("helm"), *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def delete(self, kind: str, name: str, *flags: str) -> None:
        """Delete and wait until it is gone; no error when there is none."""
        self.must("delete", kind, name, "--ignore-not-found", *flags)
