"""From buildah to the seed and the running nodes, without a registry and without moving what is already there.

The dependencies go first, as an image of their own, uncompressed (compressing 6 GB takes a minute, and the seed is the
only place they go to). The image with the code is then written into an OCI layout that holds hard links to the seed's
blobs: buildah finds the large layers there and writes only the small one. What is new goes on as a stream in the form
of an OCI archive: containerd accepts one that lacks blobs which its store has.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .. import build, namespaces
from ..current import Registry
from ..progress import step
from ..settings import CACHE, PROJECT, Cluster
from . import builder, seed

PUSH_HINT = (
    "Is REGISTRY right, may you push there (`docker login HOST` or `buildah login HOST`), and does it speak TLS "
    "(else REGISTRY=http://...)?"
)
_STREAM_LIMIT = 300 * 2**20  # bytes; more than this is quicker by a new clone of the seed


@dataclass(frozen=True)
class Export:
    """An image that buildah has written out: its name, its manifest as it is, and the folder of its blobs."""

    reference: str
    manifest: bytes
    folder: Path

    def blobs(self) -> list[Path]:
        """The files of the configuration and the layers, named by their sha256."""
        manifest = json.loads(self.manifest)
        return [self.folder / item["digest"].partition(":")[2] for item in (manifest["config"], *manifest["layers"])]

    def lacking(self, known: set[str]) -> list[Path]:
        return [blob for blob in self.blobs() if blob.name not in known]

    def write(self, blobs: list[Path], stream: IO[bytes], consume: bool) -> None:
        """Writes an OCI archive with just these blobs, under the name that containerd shall know it by.

        consume: a blob's file goes as soon as it is written, which saves the room of a second copy.
        """
        digest = hashlib.sha256(self.manifest).hexdigest()
        entry = {
            "mediaType": json.loads(self.manifest)["mediaType"],
            "digest": f"sha256:{digest}",
            "size": len(self.manifest),
            "annotations": {"io.containerd.image.name": self.reference},
        }
        texts = {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
            f"blobs/sha256/{digest}": self.manifest,
        }
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            for name, content in texts.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
            for blob in blobs:
                archive.add(blob, f"blobs/sha256/{blob.name}")
                if consume:
                    blob.unlink()


def deliver_dependencies(reference: str, image: builder.Image) -> None:
    """Brings the image with the dependencies into the seed; those that it replaces go."""
    if reference in seed.images():
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        with step(f"exporting {reference}"):
            builder.buildah("push", "--disable-compression", reference, f"dir:{scratch}")
        export = Export(reference, (Path(scratch) / "manifest.json").read_bytes(), Path(scratch))
        with seed.opened() as ctr:
            seed.prune(ctr, image.name, [], keep=0)
            seed.prune(ctr, f"{image.name}-dependencies", [reference], keep=1)
            _import(export, export.blobs(), ctr, consume=True)
            seed.note_images(ctr)


def deliver(reference: str, image: builder.Image, cluster: Cluster) -> list[int]:
    """Brings a built image into the seed and the cluster's running nodes.

    Returns the nodes that lack too much of it and should start anew, as clones of the seed.
    """
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        export = _export(reference, Path(scratch))
        with seed.opened() as ctr:
            _import(export, export.lacking({blob.name for blob in seed.blobs()}), ctr)
            # a node that starts may still be asked for the last ones
            seed.prune(ctr, image.name, [reference], keep=3)
            seed.note_images(ctr)
        running = ((node, namespaces.find(cluster.node_dir(node))) for node in cluster.known_nodes())
        return [node for node, pid in running if pid and not _import_into(export, cluster, node, pid)]


def _export(reference: str, layout: Path) -> Export:
    """Writes the image into an OCI layout, but for the blobs that the seed has."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for blob in seed.blobs():
        os.link(blob, blobs / blob.name)
    with step(f"exporting {reference}"):
        builder.buildah("push", reference, f"oci:{layout}:image")
    index = json.loads((layout / "index.json").read_text())
    manifest = blobs / index["manifests"][0]["digest"].partition(":")[2]
    return Export(reference, manifest.read_bytes(), blobs)


def _import_into(export: Export, cluster: Cluster, node: int, pid: int) -> bool:
    """Sends a running node what its store lacks of the image; False when that is too much."""
    store = cluster.node_dir(node) / "var/lib/containerd"
    lacking = export.lacking({blob.name for blob in seed.blobs(store)})
    if sum(blob.stat().st_size for blob in lacking) > _STREAM_LIMIT:
        return False
    _import(export, lacking, [*namespaces.enter_command(pid), "ctr", "--namespace", seed.NAMESPACE])
    seed.mark_current(store)
    return True


def _import(export: Export, blobs: list[Path], ctr: list[str], consume: bool = False) -> None:
    """Streams the archive into `ctr images import`, which unpacks it, too."""
    size = sum(blob.stat().st_size for blob in blobs)
    with step(f"importing {size / 2**20:.1f} MiB"), tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*ctr, "images", "import", "-"], stdin=subprocess.PIPE, stdout=output, stderr=output)
        assert process.stdin
        try:
            with process.stdin:
                export.write(blobs, process.stdin, consume)
        except BrokenPipeError:
            pass  # it ended early: its own words follow
        if process.wait():
            output.seek(0)
            raise RuntimeError(f"ctr images import: {output.read().decode().strip()}")


def push(reference: str, registry: Registry) -> str:
    """Pushes a built image to a registry; returns its reference there, by digest.

    Raises RuntimeError with buildah's words when the registry doesn't take it.
    """
    target = f"{registry.prefix}/{reference.rpartition('/')[2]}"
    with step(f"pushing {target}"), tempfile.NamedTemporaryFile("r") as digest:
        plain = ["--tls-verify=false"] if registry.plain_http else []
        try:
            builder.buildah("push", "--retry=1", *plain, "--digestfile", digest.name, reference, f"docker://{target}")
        except RuntimeError as error:
            raise RuntimeError(f"{target} can't be pushed. {PUSH_HINT}\n{error}") from error
        return f"{target.rpartition(':')[0]}@{digest.read().strip()}"


def build_with_docker(image: builder.Image, registry: Registry) -> str:
    """Builds an image by Docker and pushes it; returns its reference there, by digest.

    Raises RuntimeError when Docker can't build it or the registry doesn't take it; Docker itself has said why.
    """
    target = f"{registry.prefix}/{builder.tagged(image, 'docker').rpartition('/')[2]}"
    build_words = ["build", "--tag", target, "--file", f"{image.folder}/Dockerfile", "."]
    with step(f"building and pushing {target}"):
        if subprocess.run(["docker", *build_words], cwd=PROJECT, stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(f"docker {' '.join(build_words)} failed: see above")
        if subprocess.run(["docker", "push", target], stdout=sys.stderr, check=False).returncode:
            raise RuntimeError(f"{target} can't be pushed. {PUSH_HINT}")
    inspect = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}", target]
    found = json.loads(subprocess.run(inspect, check=True, capture_output=True, text=True).stdout)
    return next(str(name) for name in found if name.startswith(target.rpartition(":")[0] + "@"))


def ensure_tools() -> None:
    """Installs what building needs beside what the cluster needs."""
    build.distribution_packages(build.DEBIAN | build.DEBIAN_IMAGES)
