"""Faults at random moments for many minutes: `python -m tests.chaos.poisson [--mean S] [--minutes M] [--seed S]`.

On the local Kubernetes as kubegrid.py prepares it. A fault strikes one member; a node that was killed or cut comes back
after BACK_SECONDS. Goodput is the share of the time in which steps came (Timeline.stalled_seconds); `speed` is steps a
second beside the undisturbed run's, above 1 where nodes share cores and few of them are faster. Ends with one line of
JSON.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from hack.cluster.settings import load
from tests.chaos.cells import HOW_ON_CLUSTER, MAX_NODES, Cell
from tests.chaos.cputimes import CpuTimes
from tests.chaos.driver import Driver
from tests.chaos.faultplan import FaultPlan
from tests.chaos.kube import KubeCluster
from tests.chaos.kubegrid import NAME, make_manifest, prepare
from tests.chaos.report import recovery

CALM_SECONDS = 45.0  # to learn the undisturbed speed
BACK_SECONDS = 10.0
ENDLESS = 1_000_000


def strike_for(run: KubeCluster, seconds: float, mean: float, chance: random.Random) -> int:
    """Strike at random for so long; the number of faults."""
    number, begin, back = 0, time.monotonic(), float("inf")
    next_strike = begin + chance.expovariate(1 / mean)
    while time.monotonic() < begin + seconds:
        time.sleep(0.05)
        if time.monotonic() > back:
            run.restore(())
            back = float("inf")
        members = run.members()
        if time.monotonic() < next_strike or not members:
            continue
        how, rank = chance.choice(HOW_ON_CLUSTER), chance.randrange(len(members))
        number += 1
        print(
            f"{time.monotonic() - begin:6.1f}s step {run.timeline.newest_step()}: {how} {members[rank].name}",
            flush=True,
        )
        run.strike(Cell("", "one", how, str(len(members))), [members[rank]])
        if how.startswith("node") or how == "partition":
            back = min(back, time.monotonic() + BACK_SECONDS)
        next_strike = time.monotonic() + chance.expovariate(1 / mean)
    return number


def measure(run: KubeCluster, minutes: float, mean: float, seed: int) -> dict[str, object]:
    """One run under faults."""
    driver = Driver(run, FaultPlan(run.plans))
    driver.bring_to(MAX_NODES)
    calm_begin, calm_step = time.monotonic(), driver.step()
    time.sleep(CALM_SECONDS)
    speed = (driver.step() - calm_step) / (time.monotonic() - calm_begin)
    begin, step, cpu = time.monotonic(), driver.step(), CpuTimes.now()
    number = strike_for(run, minutes * 60, mean, random.Random(seed))
    run.restore(())
    end = time.monotonic()
    seconds, steps = end - begin, run.timeline.newest_step() - step
    falls = run.timeline.falls()
    return {
        "mean_seconds": mean,
        "minutes": round(seconds / 60, 1),
        "faults": number,
        "steps": steps,
        "goodput": round(1 - run.timeline.stalled_seconds(begin, end, 1 / speed) / seconds, 3),
        "speed": round(steps / seconds / speed, 3),
        "steps_lost": sum(fall.steps_lost for fall in falls),
        "max_steps_lost": max((fall.steps_lost for fall in falls if fall.pod_left), default=0),
        "max_steps_lost_all_pods_gone": max((fall.steps_lost for fall in falls if not fall.pod_left), default=0),
        **recovery(run.timeline.recoveries()),
        "state": str(run.status.state),
        "stolen_cpu_percent": CpuTimes.now().stolen_percent(cpu),
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mean", type=float, default=60.0, help="seconds between faults (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        kubectl, _ = prepare(Path(name))
        with KubeCluster(kubectl, load(NAME), make_manifest(1, ENDLESS, MAX_NODES)) as run:
            found = measure(run, options.minutes, options.mean, options.seed)
    print(json.dumps(found), flush=True)
    return 0 if found["state"] != "Failed" else 1


if __name__ == "__main__":
    sys.exit(main())
