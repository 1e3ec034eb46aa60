"""`make demo`: from nothing to an adapter, with a node killed in the middle.

Cluster, images and operator come up, the bucket is filled, examples/smollm2.yaml is applied and followed in the
terminal. When two nodes train and 40 % of the steps are done, one is killed as a spot reclaim would (everything of it
at once); the run goes on without it and takes it back when it returns. The adapter is fetched from the bucket, loaded
with peft, and what it changed is shown. What stays and how to take it down goes to stderr; stdout's last line is JSON.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hack.cluster.settings import DEFAULT_NAME
from hack.demo import adapter, upload, watch
from hack.demo.kubectl import ROOT, Kubectl, Manifest, cluster, is_local, program
from hack.demo.memory import MemoryMeter
from hack.demo.prepare_model import prepare_model
from hack.demo.spot import Killed, Spot, num_steps_repeated

NAMESPACE = "qlora-demo"
EXAMPLE = ROOT / "examples" / "smollm2.yaml"
KILL_AT = 0.4  # of the steps
MEASURED = "286 s where everything is built, 1,879 s (31 min) from a clean clone with empty caches"
START_SECONDS, RUN_SECONDS, GROW_SECONDS = 300, 1500, 240


@dataclass
class Facts:
    """What the table and the last line are made of."""

    begin: float = field(default_factory=time.monotonic)
    killed: Killed | None = None
    recovery_seconds: float | None = None
    steps_lost: int | None = None
    back_seconds: float | None = None


def main() -> int:
    """Run the demo; 0 when the adapter is there, better than the base, and the killed node cost at most one step."""
    parser = argparse.ArgumentParser(description="The whole thing once, end to end.")
    parser.add_argument("--no-kill", action="store_true", help="leave the nodes alone")
    arguments = parser.parse_args()
    display, facts = watch.Display(), Facts()
    with MemoryMeter() as meter:
        try:
            kubectl = prepare(display)
            run = fine_tune(kubectl, display, facts, kill=is_local() and not arguments.no_kill)
            result = show(run, display, facts)
        except (RuntimeError, TimeoutError, ValueError) as error:
            display.say(f"the demo failed: {error}")
            return 1
        result["peak_memory_gib"] = round(meter.peak_gib, 1)
    print(what_stays(run, kubectl), file=sys.stderr, flush=True)
    print(json.dumps(result))
    better = result["eval_loss_after"] < result["eval_loss_before"]
    return 0 if better and (result["steps_lost"] or 0) <= 1 else 1


def prepare(display: watch.Display) -> Kubectl:
    """Cluster, images, operator, bucket, Secret, and no run of an earlier demo."""
    display.say(f"the whole demo, measured on a local cluster on 2 cores: {MEASURED}")
    display.say("cluster, images and operator ...")
    cluster("up", quiet=False)
    store = upload.Store.find()  # now: what is missing in the environment is said before anything is built
    cluster("deploy", "--set", "timing.statusIntervalSeconds=0.5", quiet=False)
    kubectl = Kubectl.find(NAMESPACE)
    display.say("model and data into the bucket ...")
    upload.upload(store.client())
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}}
    kubectl.must("apply", "--server-side", "-f", "-", stdin=json.dumps(namespace))
    upload.give_access(kubectl, store)
    kubectl.delete("qft", name_of(EXAMPLE))
    return kubectl


def name_of(path: Path) -> str:
    """metadata.name of an example."""
    manifest: Manifest = yaml.safe_load(path.read_text())
    return str(manifest["metadata"]["name"])


def fine_tune(kubectl: Kubectl, display: watch.Display, facts: Facts, kill: bool) -> watch.Run:
    """Apply the example and follow it to its end; in the middle a node dies and comes back."""
    display.say(f"kubectl apply -f {EXAMPLE.relative_to(ROOT)}")
    print(kubectl.must("apply", "-f", "-", stdin=upload.example(EXAMPLE)).strip())
    with watch.RunWatch(kubectl, name_of(EXAMPLE)) as followed:
        followed.until("training", lambda run: watch.step(run) > 0, START_SECONDS, display)
        if kill:
            followed.until("two nodes", lambda run: watch.active(run) == 2, GROW_SECONDS, display)
            run = followed.until(f"{KILL_AT:.0%} of the steps", reached(KILL_AT), RUN_SECONDS, display)
            disrupt(kubectl, followed, run, display, facts)
        done = followed.until("the adapter", lambda run: watch.word(run) == "Succeeded", RUN_SECONDS, display)
    display.say("succeeded")
    return done


def reached(share: float) -> Any:
    """A check: two nodes train and so much of the steps is done."""

    def check(run: watch.Run) -> bool:
        total = watch.status(run).get("progress", {}).get("totalSteps", 0)
        return bool(total) and watch.step(run) >= share * total and watch.active(run) == 2

    return check


def disrupt(kubectl: Kubectl, followed: watch.RunWatch, run: watch.Run, display: watch.Display, facts: Facts) -> None:
    """Kill a node, time the recovery, count the repeated steps, bring the node back."""
    spot = Spot.choose(kubectl, run)
    display.say(f"killing node{spot.number} ({spot.pod}) as a spot reclaim would, after step {watch.step(run)} ...")
    facts.killed = spot.kill(run)
    after = followed.until("recovery", facts.killed.is_recovered, RUN_SECONDS, display)
    facts.recovery_seconds = facts.killed.seconds_until(after)
    facts.steps_lost = num_steps_repeated(kubectl, after, facts.killed.generation)
    display.say(
        f"training again after {facts.recovery_seconds:.1f} s on {watch.active(after)} of 2 nodes;"
        f" steps done twice: {facts.steps_lost}"
    )
    display.say(f"node{spot.number} comes back ...")
    begin = time.monotonic()
    spot.start()
    grown = followed.until(
        "two nodes again", lambda run: watch.active(run) == 2 or watch.word(run) in watch.TERMINAL, RUN_SECONDS, display
    )
    if watch.active(grown) == 2:
        facts.back_seconds = time.monotonic() - begin
        display.say(f"two nodes again {facts.back_seconds:.0f} s after its return")


def show(run: watch.Run, display: watch.Display, facts: Facts) -> dict[str, Any]:
    """Fetch and check the adapter, print samples and the table; the last line's content."""
    artifacts = watch.status(run)["artifacts"]
    client = upload.Store.find().client()
    display.say(f"fetching {artifacts['adapterUri']} and loading it with peft ...")
    with tempfile.TemporaryDirectory() as folder:
        files = adapter.fetch(client, artifacts["adapterUri"], Path(folder))
        weights = Path(folder) / "adapter_model.safetensors"
        if adapter.sha256(weights) != artifacts["adapterSha256"]:
            raise RuntimeError(f"{weights.name} is not what the status says was uploaded")
        for sample in adapter.compare(prepare_model(), Path(folder)):
            print(f"\n  Define: {sample.word}\n    before  {sample.before[:100]}\n    after   {sample.after[:100]}")
        size = sum(path.stat().st_size for path in files)
    result = {
        "eval_loss_before": artifacts["evalLossBefore"],
        "eval_loss_after": artifacts["evalLossAfter"],
        "steps_lost": facts.steps_lost,
        "recovery_seconds": round(facts.recovery_seconds, 2) if facts.recovery_seconds is not None else None,
        "adapter_bytes": artifacts["adapterBytes"],
        "seconds": round(time.monotonic() - facts.begin, 1),
    }
    table(result, size, facts)
    return result


def table(result: dict[str, Any], size: int, facts: Facts) -> None:
    """The result for people."""
    lost, recovery = result["steps_lost"], result["recovery_seconds"]
    rows = [
        ("evaluation loss before", f"{result['eval_loss_before']:.3f} nats a token"),
        ("evaluation loss after", f"{result['eval_loss_after']:.3f} nats a token"),
        ("steps lost with the node", "-" if lost is None else str(lost)),
        ("from kill to the next new step", "-" if recovery is None else f"{recovery:.1f} s"),
        ("from its return to two nodes", "-" if facts.back_seconds is None else f"{facts.back_seconds:.0f} s"),
        ("adapter in the bucket", f"{size / 1e6:.1f} MB"),
        ("whole demo", f"{result['seconds']:.0f} s"),
    ]
    print("\n" + "\n".join(f"  {name:<32} {value}" for name, value in rows) + "\n")


def what_stays(run: watch.Run, kubectl: Kubectl) -> str:
    """What goes on after the demo, how to look at it, where the adapter is, how to take it all down."""
    program_name = "kubectl" if shutil.which("kubectl") else program("kubectl")
    look = f"{program_name} -n {kubectl.namespace} get qft"
    lines = [f"adapter: {watch.status(run)['artifacts']['adapterUri']}"]
    if kubectl.kubeconfig:
        name = kubectl.kubeconfig.parent.name
        down = "make cluster-down" if name == DEFAULT_NAME else f"make CLUSTER_NAME={name} cluster-down"
        lines += [
            f"S3's address and keys: {kubectl.kubeconfig.with_name('s3.env')}",
            "The cluster goes on running. Look at it:",
            f"  export KUBECONFIG={kubectl.kubeconfig}",
            f"  {look}",
            f"Take it down: {down} (deletes S3, the adapter included; {down} KEEP=1 keeps both)",
        ]
    else:
        lines += [
            f"The operator and the run stay: {look}",
            f"Take them away: kubectl delete namespace {kubectl.namespace} && make CLUSTER=current undeploy",
        ]
    return "\n".join([*lines, "The adapter loaded, your own data: docs/your-own-run.md"])


if __name__ == "__main__":
    sys.exit(main())
