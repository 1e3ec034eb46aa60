"""The commands of the local cluster: `python -m hack.cluster --help`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from . import build, current, leftovers, lifecycle, namespaces, node
from .images import commands
from .settings import DEFAULT_NAME, Cluster, load

_PASS_ON = ("kubectl", "helm", "deploy")


def main() -> int:
    own, words = _split(sys.argv[1:])
    arguments = _parser().parse_args(own, argparse.Namespace(words=words))
    try:
        return arguments.run(arguments) or 0
    except (ValueError, RuntimeError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those for the program that is run (argparse would take its options for ours)."""
    at = next((index for index, word in enumerate(words) if word in _PASS_ON), len(words))
    return words[: at + 1], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hack.cluster", description=__doc__)
    parser.add_argument(
        "--name", default=os.environ.get("CLUSTER_NAME", DEFAULT_NAME), help="CLUSTER_NAME (%(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    up = command("up", _up, "start the cluster, building what is missing")
    up.add_argument("--nodes", type=int, default=int(os.environ.get("NODES", "2")), help="worker nodes, 1 to 5")
    up.add_argument("--gpus", type=int, default=int(os.environ.get("GPUS", "2")), help="GPU devices a node")
    up.add_argument("--node-memory", type=float, default=0, metavar="GIB", help="allocatable memory of a node")
    up.add_argument("--quick", action="store_true", default=os.environ.get("QUICK") == "1", help="quick node death")
    up.add_argument("--control-plane-only", action="store_true", help="etcd and the API server, nothing else")
    down = command("down", _down, "stop it and delete what its S3 holds, adapters included, unless --keep is set")
    down.add_argument("--keep", action="store_true", help="keep its state (etcd, node disks, S3) for the next up")
    command("status", _status, "what runs and how to reach it, as JSON")
    command("leftovers", _leftovers, "list what a cluster that is down left behind; fails when there is any")
    for tool in ("kubectl", "helm"):
        command(tool, _tool, f"run {tool} against the cluster; all further words are its own").set_defaults(tool=tool)
    command("path", _path, "print where a program is, built if need be").add_argument("program")
    machine = command("node", _node, "kill, start, cut or heal a node, or kill its kubelet alone")
    machine.add_argument("action", choices=("kill", "start", "cut", "heal", "kill-kubelet"))
    machine.add_argument("number", type=int)
    machine.add_argument("--silent", action="store_true", help="kill: cut the link first, so that no peer is told")
    machine.add_argument("--fresh", action="store_true", help="start: as a new machine with an empty disk")
    images = command("images", _images, "build both images and load them; prints their references as JSON")
    images.add_argument("--only", choices=("operator", "trainer"), help="just this one")
    command("deploy", _deploy, "images, then the operator by its chart; further words go to helm")
    command("undeploy", _undeploy, "remove the operator; its CRD and the runs stay")
    command("registry", _registry, "start a registry beside the cluster, to try CLUSTER=current with; prints its URL")
    command("shell", _shell, "a shell (or a command) in a node or, without --node, the control plane").add_argument(
        "words", nargs=argparse.REMAINDER
    )
    commands.choices["shell"].add_argument("--node", type=int)
    return parser


def _uses_current() -> bool:
    return os.environ.get("CLUSTER", "local") == "current"


def _local(arguments: argparse.Namespace, claim: bool = False) -> Cluster:
    if _uses_current():
        raise ValueError("CLUSTER=current: this command is for the local cluster only")
    return load(arguments.name, claim)


def _target(arguments: argparse.Namespace) -> Cluster | None:
    """The local cluster; None for the current context's."""
    return None if _uses_current() else load(arguments.name)


def _up(arguments: argparse.Namespace) -> None:
    if _uses_current():
        found = current.require()
        print("CLUSTER=current: context {context}, {api}, Kubernetes {version}".format(**found), file=sys.stderr)
        return
    options = lifecycle.Options(
        arguments.nodes, arguments.gpus, arguments.quick, arguments.control_plane_only, arguments.node_memory
    )
    lifecycle.up(_local(arguments, claim=True), options)


def _down(arguments: argparse.Namespace) -> None:
    if _uses_current():
        print("CLUSTER=current: left as it is", file=sys.stderr)
        return
    lifecycle.down(_local(arguments), arguments.keep)


def _status(arguments: argparse.Namespace) -> None:
    print(json.dumps(current.status() if _uses_current() else lifecycle.status(_local(arguments)), indent=2))


def _leftovers(arguments: argparse.Namespace) -> int:
    found = leftovers.find(_local(arguments))
    print("\n".join(found) or "nothing")
    return 1 if found else 0


def _tool(arguments: argparse.Namespace) -> int:
    environment = dict(os.environ)
    if not _uses_current():
        environment["KUBECONFIG"] = str(load(arguments.name).kubeconfig)
    return subprocess.run([_program(arguments.tool), *arguments.words], env=environment, check=False).returncode


def _path(arguments: argparse.Namespace) -> None:
    print(_program(arguments.program))


def _program(name: str) -> Path:
    if _uses_current() and name in ("kubectl", "helm"):
        return current.client(name)
    build.binaries(name)
    return build.program(name)


def _registry(arguments: argparse.Namespace) -> None:
    print(lifecycle.start_registry(_local(arguments)))


def _node(arguments: argparse.Namespace) -> None:
    cluster, number = _local(arguments), arguments.number
    outer = lifecycle.outer_pid(cluster)
    match arguments.action:
        case "kill":
            node.kill(cluster, number, outer, arguments.silent)
        case "start":
            lifecycle.start_node(cluster, number, arguments.fresh)
        case "cut":
            node.cut(cluster, number, outer, "down")
        case "heal":
            node.cut(cluster, number, outer, "up")
        case "kill-kubelet":
            node.kill_kubelet(cluster, number)


def _images(arguments: argparse.Namespace) -> None:
    names = [arguments.only] if arguments.only else ["operator", "trainer"]
    print(json.dumps(commands.load_all(_target(arguments), names), indent=2))


def _deploy(arguments: argparse.Namespace) -> None:
    commands.deploy(_target(arguments), arguments.words)


def _undeploy(arguments: argparse.Namespace) -> None:
    commands.undeploy(_target(arguments))


def _shell(arguments: argparse.Namespace) -> int:
    cluster = _local(arguments)
    folder = cluster.node_dir(arguments.node) if arguments.node else cluster.dir
    pid = namespaces.find(folder)
    if pid is None:
        raise ValueError(f"{folder.name} doesn't run")
    environment = os.environ | {"PATH": build.path_variable(), "KUBECONFIG": str(cluster.kubeconfig)}
    words = arguments.words or ["bash"]
    return subprocess.run(
        [*namespaces.enter_command(pid), *words], env=environment, cwd=Path("/"), check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
