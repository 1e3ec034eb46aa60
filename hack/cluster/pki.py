"""The cluster's own certificate authority, its certificates and kubeconfigs (openssl, elliptic curves, 0.2 s).

Made once per cluster and kept as long as its folder; valid for ten years of a developer's machine, secret to it.
"""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

from .settings import MAX_NODES, Cluster

_DAYS = "3650"
_MASTERS = "/O=system:masters"
_CLIENTS = {  # file -> subject; the subject's common name is the RBAC user, its organisation the group
    "apiserver-kubelet": f"{_MASTERS}/CN=kube-apiserver-kubelet-client",
    "admin": f"{_MASTERS}/CN=admin",
    "kube-controller-manager": "/CN=system:kube-controller-manager",
    "kube-scheduler": "/CN=system:kube-scheduler",
    "kube-proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=system:coredns",  # controlplane.py gives it the role
}


def ensure(cluster: Cluster) -> None:
    """Writes pki/ and kubeconfigs/ of the cluster, and its kubeconfig for people, where they are missing."""
    pki = cluster.dir / "pki"
    if (pki / ".complete").exists():
        return
    pki.mkdir(parents=True, exist_ok=True)
    pki.chmod(0o700)
    (cluster.dir / "kubeconfigs").mkdir(exist_ok=True)
    _authority(pki)
    names = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
    _certificate(
        pki,
        "apiserver",
        "/CN=kube-apiserver",
        addresses=(cluster.control_plane, "127.0.0.1", cluster.kubernetes_service),
        names=(*names, "kubernetes.default.svc.cluster.local"),
    )
    clients = dict(_CLIENTS)
    for node in range(1, MAX_NODES + 1):
        subject = f"/O=system:nodes/CN=system:node:node{node}"
        clients[f"node{node}"] = subject
        _certificate(
            pki, f"node{node}-server", subject, addresses=(cluster.node_address(node),), names=(f"node{node}",)
        )
    for name, subject in clients.items():
        _certificate(pki, name, subject)
        _kubeconfig(cluster, name, cluster.dir / "kubeconfigs" / name)
    _kubeconfig(cluster, "admin", cluster.kubeconfig)
    (pki / ".complete").touch()


def _openssl(pki: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *arguments], cwd=pki, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def _key(pki: Path, file: str) -> None:
    _openssl(pki, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", file)


def _authority(pki: Path) -> None:
    _key(pki, "ca.key")
    _openssl(
        pki, "req", "-x509", "-new", "-key", "ca.key", "-days", _DAYS, "-subj", "/CN=local-cluster", "-out", "ca.crt"
    )
    _openssl(pki, "genrsa", "-out", "service-account.key", "2048")
    _openssl(pki, "rsa", "-in", "service-account.key", "-pubout", "-out", "service-account.pub")


def _certificate(
    pki: Path, name: str, subject: str, addresses: tuple[str, ...] = (), names: tuple[str, ...] = ()
) -> None:
    """A key and a certificate: for a server when it has addresses, for a client otherwise."""
    extensions = ["keyUsage=digitalSignature", f"extendedKeyUsage={'serverAuth' if addresses else 'clientAuth'}"]
    if addresses:
        alternatives = [f"IP:{address}" for address in addresses] + [f"DNS:{host}" for host in names]
        extensions.append(f"subjectAltName={','.join(alternatives)}")
    (pki / f"{name}.ext").write_text("\n".join(extensions))
    _key(pki, f"{name}.key")
    request = _openssl(pki, "req", "-new", "-key", f"{name}.key", "-subj", subject)
    authority = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", _DAYS)
    _openssl(pki, "x509", "-req", *authority, "-extfile", f"{name}.ext", "-out", f"{name}.crt", stdin=request)
    (pki / f"{name}.ext").unlink()


def _kubeconfig(cluster: Cluster, user: str, target: Path) -> None:
    """A kubeconfig with everything inside, so that it works wherever it is copied to."""

    def inline(file: str) -> str:
        return base64.b64encode((cluster.dir / "pki" / file).read_bytes()).decode()

    name = f"qlora-{cluster.name}"
    target.touch(mode=0o600)
    target.write_text(
        f"""apiVersion: v1
kind: Config
current-context: {name}
contexts: [{{name: {name}, context: {{cluster: {name}, user: {user}}}}}]
clusters:
- name: {name}
  cluster: {{server: "https://{cluster.control_plane}:6443", certificate-authority-data: {inline("ca.crt")}}}
users:
- name: {user}
  user: {{client-certificate-data: {inline(f"{user}.crt")}, client-key-data: {inline(f"{user}.key")}}}
"""
    )
