"""`images` and `deploy`: the project's images into the cluster (or a registry), the operator by its chart."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import build, current, lifecycle, preflight
from ..current import Registry
from ..progress import say, step
from ..settings import PROJECT, Cluster, locked
from . import builder, seed, transport

RELEASE, NAMESPACE = "qlora-operator", "qlora-system"


def load_all(cluster: Cluster | None, names: list[str]) -> dict[str, str]:
    """Builds the named images and brings them to the cluster's nodes, or with None to REGISTRY; name -> reference."""
    if cluster is None:
        registry, to_registry = Registry.given(), _registry_builder()
        with step(f"images in {registry.prefix}"):
            return {name: to_registry(builder.IMAGES[name], registry) for name in names}
    preflight.check_images()
    transport.ensure_tools()
    return {name: _to_nodes(builder.IMAGES[name], cluster) for name in names}


def _to_nodes(image: builder.Image, cluster: Cluster) -> str:
    with locked(image.name):
        dependencies, reference = builder.build_image(image)
        if reference in seed.images() and not lifecycle.lacking(cluster, reference):
            say(f"{reference}: already there")
            return reference
        transport.deliver_dependencies(dependencies, image)
        for node in transport.deliver(reference, image, cluster):
            say(f"node{node} lacks the dependencies: it starts anew as a clone of the seed")
            lifecycle.restart_node(cluster, node)
        return reference


def _registry_builder() -> Callable[[builder.Image, Registry], str]:
    """What builds and pushes: buildah as for the local cluster, or Docker where that is what this machine has."""
    if shutil.which("docker") and (preflight.machine() or not shutil.which("buildah")):
        return transport.build_with_docker
    preflight.check_images(current=True)
    transport.ensure_tools()
    return _build_and_push


def _build_and_push(image: builder.Image, registry: Registry) -> str:
    with locked(image.name):
        return transport.push(builder.build_image(image)[1], registry)


def deploy(cluster: Cluster | None, extra: list[str]) -> None:
    """Builds, loads and installs or upgrades everything by the Helm chart; `extra` goes to helm.

    Raises ValueError before anything is built when the cluster (or REGISTRY) is not there.
    """
    if cluster is None:
        current.require()
    else:
        lifecycle.outer_pid(cluster)
    with ThreadPoolExecutor(1) as pool:
        helm = pool.submit(_helm_program, cluster)  # minutes when it is to be built, and the images' are waits, mostly
        references = load_all(cluster, ["operator", "trainer"])
        helm.result()
    values = []
    for prefix, reference in (("image", references["operator"]), ("trainer.image", references["trainer"])):
        # by digest from a registry, by tag on the local nodes
        kind = "digest" if "@" in reference else "tag"
        repository, _, value = reference.partition("@") if kind == "digest" else reference.rpartition(":")
        values += ["--set-string", f"{prefix}.repository={repository},{prefix}.{kind}={value}"]
    install = ["upgrade", "--install", RELEASE, str(PROJECT / "charts" / "qlora-operator"), "--wait"]
    install += ["--take-ownership", "--force-conflicts"]  # the CRD may be there already, from `make install`
    _helm(cluster, *install, "--namespace", NAMESPACE, "--create-namespace", *values, *extra)


def undeploy(cluster: Cluster | None) -> None:
    _helm(cluster, "uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found", "--wait")


def _helm(cluster: Cluster | None, *arguments: str) -> None:
    environment = os.environ | ({"KUBECONFIG": str(cluster.kubeconfig)} if cluster else {})
    subprocess.run([str(_helm_program(cluster)), *arguments], env=environment, check=True)


def _helm_program(cluster: Cluster | None) -> Path:
    if cluster is None:
        return current.client("helm")
    build.binaries("helm")
    return build.program("helm")
