"""`images` and `deploy`: the project's images into the cluster (or a registry), the operator by its chart."""

from __future__ import annotations

import os
import shutil
import subprocess

from .. import build, lifecycle, preflight
from ..progress import say, step
from ..settings import PROJECT, Cluster, locked
from . import builder, seed, transport

RELEASE, NAMESPACE = "qlora-operator", "qlora-system"


def load_all(cluster: Cluster | None, names: list[str]) -> dict[str, str]:
    """Builds the named images and brings them to the cluster's nodes, or with None to REGISTRY; name -> reference."""
    if cluster is not None:
        preflight.check_images()
        transport.ensure_tools()
    references = {}
    for name in names:
        with locked(f"image-{name}"):
            image = builder.IMAGES[name]
            references[name] = _to_nodes(image, cluster) if cluster else _to_registry(image)
    return references


def _to_nodes(image: builder.Image, cluster: Cluster) -> str:
    dependencies, reference = builder.build_image(image)
    if reference in seed.images() and not lifecycle.lacking(cluster, reference):
        say(f"{reference}: already there")
        return reference
    transport.deliver_dependencies(dependencies, image)
    for node in transport.deliver(reference, image, cluster):
        say(f"node{node} lacks the dependencies: it starts anew as a clone of the seed")
        lifecycle.restart_node(cluster, node)
    return reference


def _to_registry(image: builder.Image) -> str:
    registry = os.environ.get("REGISTRY")
    if not registry:
        raise ValueError("CLUSTER=current needs REGISTRY=<host/path>, a registry that its nodes pull from")
    if shutil.which("docker"):
        dockerfile = f"{image.folder}/Dockerfile"
        target = f"{registry.rstrip('/')}/{builder.tagged(image, 'docker').rpartition('/')[2]}"
        with step(f"building and pushing {target}"):
            subprocess.run(["docker", "build", "--tag", target, "--file", dockerfile, "."], cwd=PROJECT, check=True)
            subprocess.run(["docker", "push", target], check=True)
        return target
    transport.ensure_tools()
    return transport.push(builder.build_image(image)[1], registry)


def deploy(cluster: Cluster | None, extra: list[str]) -> None:
    """Builds, loads and installs or upgrades everything by the Helm chart; `extra` goes to helm."""
    references = load_all(cluster, ["operator", "trainer"])
    values = []
    for prefix, reference in (("image", references["operator"]), ("trainer.image", references["trainer"])):
        repository, _, tag = reference.rpartition(":")
        values += ["--set", f"{prefix}.repository={repository}", "--set", f"{prefix}.tag={tag}"]
    install = ["upgrade", "--install", RELEASE, str(PROJECT / "charts" / "qlora-operator"), "--wait"]
    install += ["--take-ownership", "--force-conflicts"]  # the CRD may be there already, from `make install`
    _helm(cluster, *install, "--namespace", NAMESPACE, "--create-namespace", *values, *extra)


def undeploy(cluster: Cluster | None) -> None:
    _helm(cluster, "uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found", "--wait")


def _helm(cluster: Cluster | None, *arguments: str) -> None:
    build.binaries("helm")
    environment = os.environ | ({"KUBECONFIG": str(cluster.kubeconfig)} if cluster else {})
    subprocess.run([str(build.program("helm")), *arguments], env=environment, check=True)
