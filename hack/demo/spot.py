"""A spot reclaim on the local cluster: one member's node dies at once and comes back later; what that cost."""

import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from hack.cluster import lifecycle, node
from hack.cluster.settings import DEFAULT_NAME, Cluster, load
from hack.demo import watch
from hack.demo.kubectl import Kubectl

RUN_DIR = "/run/qlora"


@dataclass(frozen=True)
class Killed:
    """How the run stood when its node was killed."""

    at: datetime
    generation: int
    step: int

    def is_recovered(self, run: watch.Run) -> bool:
        """A newer generation has done a step that was not done before."""
        found = watch.status(run)
        return int(found.get("generation", 0)) > self.generation and watch.step(run) > self.step + 1

    def seconds_until(self, run: watch.Run) -> float:
        """From the kill to the newest step of this state."""
        moment = datetime.fromisoformat(watch.status(run)["progressTime"])
        return (moment - self.at).total_seconds()


@dataclass(frozen=True)
class Spot:
    """The node to lose."""

    cluster: Cluster
    number: int
    pod: str

    @classmethod
    def choose(cls, kubectl: Kubectl, run: watch.Run) -> "Spot":
        """A member's node, and of two the one on which the operator does not run: it is not on spot nodes.

        Raises:
            RuntimeError: both members stand on the operator's node.
        """
        words = ("get", "pods", "-A", "-l", "app.kubernetes.io/name=qlora-operator", "-o", "json")
        taken = {pod["spec"].get("nodeName") for pod in json.loads(kubectl.must(*words))["items"]}
        for member in watch.status(run)["members"]:
            if member["nodeName"] not in taken and (match := re.fullmatch(r"node(\d+)", member["nodeName"])):
                return cls(load(os.environ.get("CLUSTER_NAME", DEFAULT_NAME)), int(match[1]), member["podName"])
        raise RuntimeError("every member runs beside the operator: no node to lose")

    def kill(self, run: watch.Run) -> Killed:
        """Everything on the node ends now."""
        found = watch.status(run)
        killed = Killed(datetime.now(UTC), int(found["generation"]), watch.step(run))
        node.kill(self.cluster, self.number, lifecycle.outer_pid(self.cluster), silent=False)
        return killed

    def start(self) -> None:
        """The node returns as it was and is Ready."""
        lifecycle.start_node(self.cluster, self.number, fresh=False)


def num_steps_repeated(kubectl: Kubectl, run: watch.Run, generation: int) -> int | None:
    """Steps that were worked on in the lost generation and again in the next, from the survivor's own trace.

    None when the run keeps no trace (QLORA_TRACE in the pod's environment).
    """
    member = watch.status(run)["members"][0]
    command = ("exec", member["podName"], "--", "sh", "-c", f"cat {RUN_DIR}/trace-*.jsonl")
    answer = kubectl.run(*command)
    if answer.returncode:
        return None
    lines = [json.loads(text) for text in answer.stdout.splitlines()]
    before = {line["step"] for line in lines if line["generation"] <= generation}
    after = {line["step"] for line in lines if line["generation"] > generation}
    return len(before & after)
