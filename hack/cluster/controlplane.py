"""The control plane in the outer namespaces: etcd, API server, controllers, scheduler, CoreDNS, kube-proxy and S3.

CoreDNS and S3 run here rather than in pods so that the loss of a node never takes them along; Services without a
selector give them their usual names inside the cluster.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

from . import build, namespaces, network, pki, s3
from .progress import step, wait_for
from .settings import Cluster, Timing


def ensure(cluster: Cluster, timing: Timing, only_api: bool) -> int:
    """Starts what doesn't run yet and returns the outer PID 1; with `only_api` nothing but etcd and the API server."""
    pki.ensure(cluster)
    outer = namespaces.find(cluster.dir)
    if outer is None:
        outer = namespaces.create(cluster.dir, f"{cluster.name}-control-plane")
        try:
            network.connect_control_plane(cluster, outer)
        except BaseException:
            namespaces.kill(outer)  # half a machine would pass for a running one
            raise
    started = _start(cluster, outer, {"etcd": _etcd(cluster), "kube-apiserver": _api_server(cluster, timing)})
    with step("API server ready") if started else step("API server checked"):
        wait_for("API server", lambda: api_ready(cluster), 60)
    if not only_api:
        # only now: the controller manager exits when it comes before the bootstrap of RBAC
        _start(cluster, outer, _controllers(cluster, timing))
        _objects(cluster)
        _start(cluster, outer, {"coredns": ["-conf", _corefile(cluster)]})
        s3.ensure(cluster, outer)
    return outer


def _start(cluster: Cluster, outer: int, programs: dict[str, list[str | Path]]) -> list[str]:
    missing = [name for name in programs if not namespaces.runs(outer, str(build.program(name)))]
    for name in missing:
        log = cluster.dir / "log" / f"{name}.log"
        command = [build.program(name), *programs[name]]
        namespaces.start(outer, command, log, {"PATH": build.path_variable()})
    return missing


def _etcd(cluster: Cluster) -> list[str | Path]:
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return [
        "--name=etcd",
        f"--data-dir={cluster.dir / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=etcd={peer}",
        "--unsafe-no-fsync",  # a power cut may lose this cluster; it is not worth a disk's latency
        "--log-level=warn",
    ]


def _api_server(cluster: Cluster, timing: Timing) -> list[str | Path]:
    keys = cluster.dir / "pki"
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={cluster.control_plane}",  # there is no default route to guess it from
        "--secure-port=6443",
        f"--tls-cert-file={keys / 'apiserver.crt'}",
        f"--tls-private-key-file={keys / 'apiserver.key'}",
        f"--client-ca-file={keys / 'ca.crt'}",
        # no aggregated API uses it, but the controllers log an error every ten seconds without
        f"--requestheader-client-ca-file={keys / 'ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        f"--kubelet-client-certificate={keys / 'apiserver-kubelet.crt'}",
        f"--kubelet-client-key={keys / 'apiserver-kubelet.key'}",
        f"--kubelet-certificate-authority={keys / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-cluster-ip-range={cluster.service_net}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-signing-key-file={keys / 'service-account.key'}",
        f"--service-account-key-file={keys / 'service-account.pub'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",  # beside the defaults, PodSecurity among them
        "--allow-privileged=true",
        f"--default-not-ready-toleration-seconds={timing.toleration}",
        f"--default-unreachable-toleration-seconds={timing.toleration}",
    ]


def _controllers(cluster: Cluster, timing: Timing) -> dict[str, list[str | Path]]:
    keys = cluster.dir / "pki"

    def client(name: str) -> list[str | Path]:
        file = cluster.dir / "kubeconfigs" / name
        flags = ("--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig")
        return [*(f"{flag}={file}" for flag in flags), "--bind-address=127.0.0.1", "--leader-elect=false"]

    return {
        "kube-controller-manager": [
            *client("kube-controller-manager"),
            f"--service-account-private-key-file={keys / 'service-account.key'}",
            f"--root-ca-file={keys / 'ca.crt'}",
            "--use-service-account-credentials=true",
            f"--cluster-signing-cert-file={keys / 'ca.crt'}",
            f"--cluster-signing-key-file={keys / 'ca.key'}",
            "--node-monitor-period=500ms",
            f"--node-monitor-grace-period={timing.grace}s",
            "--node-startup-grace-period=20s",
            # per second; the default of 0.1 taints the second node of two 10 s late
            "--node-eviction-rate=10",
            "--unhealthy-zone-threshold=1.0",
        ],
        "kube-scheduler": client("kube-scheduler"),
        "kube-proxy": [f"--config={proxy_config(cluster, cluster.dir, f'{cluster.name}-control-plane')}"],
    }


def _corefile(cluster: Cluster) -> Path:
    """Answers for the cluster's names and says at once that any other name doesn't exist: there is no way out.

    Two blocks, because within one `template` comes before `kubernetes`, whatever their order here.
    """
    file = cluster.dir / "Corefile"
    file.write_text(
        f"""cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {{
  bind {cluster.control_plane}
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {cluster.dir / "kubeconfigs" / "coredns"}
    pods insecure
    ttl 1
  }}
}}
.:53 {{
  bind {cluster.control_plane}
  errors
  template ANY ANY . {{
    rcode NXDOMAIN
  }}
}}
"""
    )
    return file


def proxy_config(cluster: Cluster, folder: Path, hostname: str) -> Path:
    """kube-proxy's configuration for one machine: nftables, because the kernel may lack IPVS and iptables' modules."""
    file = folder / "kube-proxy.json"
    # zero leaves the connection tracking's limits alone: they are the whole machine's
    conntrack = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    text = json.dumps(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clusterCIDR": cluster.pod_net,
            "hostnameOverride": hostname,
            "clientConnection": {"kubeconfig": str(cluster.dir / "kubeconfigs" / "kube-proxy")},
            "conntrack": conntrack,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        },
        indent=1,
    )
    if not file.exists() or file.read_text() != text:  # kube-proxy ends when its file is written, changed or not
        file.write_text(text)
    return file


def api_ready(cluster: Cluster) -> bool:
    """Whether the API server says that it is ready, RBAC bootstrap included."""
    keys = cluster.dir / "pki"
    context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
    context.load_cert_chain(keys / "admin.crt", keys / "admin.key")
    try:
        with urllib.request.urlopen(
            f"https://{cluster.control_plane}:6443/readyz", context=context, timeout=2
        ) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def kubectl(cluster: Cluster, *arguments: str, stdin: str = "") -> str:
    """kubectl as admin; RuntimeError with what it said when it fails."""
    command = [str(build.program("kubectl")), f"--kubeconfig={cluster.kubeconfig}", *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _objects(cluster: Cluster) -> None:
    """CoreDNS's role; kube-dns at its fixed address and s3.s3.svc, both leading to the control plane's address."""
    documents: list[dict[str, object]] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "s3"}}]
    documents += _coredns_role()
    dns = {"dns": (53, "UDP"), "dns-tcp": (53, "TCP")}
    documents += _service(cluster, "kube-system", "kube-dns", dns, cluster.dns_service)
    documents += _service(cluster, "s3", "s3", {"s3": (s3.PORT, "TCP")})
    kubectl(cluster, "apply", "--server-side", "-f", "-", stdin="\n---\n".join(json.dumps(item) for item in documents))


def _coredns_role() -> list[dict[str, object]]:
    """The ClusterRole that CoreDNS's own manifests give it, for the user of its certificate."""
    name = "system:coredns"
    watched = {"": ["endpoints", "services", "pods", "namespaces"], "discovery.k8s.io": ["endpointslices"]}
    rules = [{"apiGroups": [group], "resources": kinds, "verbs": ["list", "watch"]} for group, kinds in watched.items()]
    group = "rbac.authorization.k8s.io"
    common = {"apiVersion": f"{group}/v1", "metadata": {"name": name}}
    return [
        {**common, "kind": "ClusterRole", "rules": rules},
        {
            **common,
            "kind": "ClusterRoleBinding",
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": name}],
        },
    ]


def _service(
    cluster: Cluster, namespace: str, name: str, ports: dict[str, tuple[int, str]], address: str = ""
) -> list[dict[str, object]]:
    """A Service without a selector and the EndpointSlice that leads to the control plane."""
    listed = [{"name": key, "port": port, "protocol": protocol} for key, (port, protocol) in ports.items()]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": listed} | ({"clusterIP": address} if address else {}),
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": listed,
            "endpoints": [{"addresses": [cluster.control_plane], "conditions": {"ready": True}}],
        },
    ]
