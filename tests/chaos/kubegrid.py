"""The cells of the kill grid that need Kubernetes.

Three nodes that are struck and a fourth that carries the operator, which is not on spot nodes. The run is as small as
in grid.py, in S3; afterwards it is compared with an undisturbed one.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from hack.cluster.settings import Cluster, load
from hack.demo import upload
from hack.demo.kubectl import Kubectl, Manifest, cluster
from tests.chaos import tiny
from tests.chaos.cells import MAX_NODES, Cell
from tests.chaos.driver import CHECKPOINT_STEPS, Driver
from tests.chaos.faultplan import FILE_NAME, FaultPlan
from tests.chaos.kube import KubeCluster
from tests.chaos.report import Report, carry_out
from tests.chaos.verify import Steps, compare
from tests.e2e.support import fresh_namespace

from qlora_api.run import RUN_DIR

NAME, NAMESPACE, BUCKET, TAINT = "chaos", "qlora-chaos", "qlora-chaos", "qlora.dev/not-spot"
CELLS_PER_RUN, STEPS_PER_CELL, SPARE_STEPS = 7, 130, 30
GLOBAL_BATCH = 24  # makes a step take some tenths of a second


class KubeGrid:
    """Runs of one length on one cluster; the undisturbed one first."""

    def __init__(self, folder: Path, kubectl: Kubectl, local: Cluster, store: upload.Store, num_steps: int) -> None:
        self._folder, self._kubectl, self._local, self._store = folder, kubectl, local, store
        self._num_steps, self._number = num_steps, 0
        with self._start(max_nodes=1) as run:
            self._reference = self._finish(run)

    def strike(self, cells: list[Cell], report: Report) -> list[Cell]:
        """One run with these faults; then the comparison. Returns the cells it had no time for."""
        with self._start(MAX_NODES) as run:
            num_failed = len(report.failed)
            left = report.strike(Driver(run, FaultPlan(run.plans)), cells, self._num_steps - SPARE_STEPS)
            report.growths += run.timeline.growths()
            if len(report.failed) > num_failed:
                return left
            steps, bucket = self._finish(run)
        report.comparisons.append(compare(steps, bucket, *self._reference))
        print(f"run {self._number}: {report.comparisons[-1]}", flush=True)
        return left

    def _start(self, max_nodes: int) -> KubeCluster:
        self._number += 1
        return KubeCluster(self._kubectl, self._local, make_manifest(self._number, self._num_steps, max_nodes))

    def _finish(self, run: KubeCluster) -> tuple[Steps, Path]:
        """Let the run end; what its pods traced, and its part of the bucket as a folder."""
        started = time.monotonic()
        run.wait_for(lambda: run.is_over, 900, "the end of the run")
        assert run.status.artifacts is not None, run.describe()
        print(
            f"run {self._number}: {self._num_steps} steps, the rest in {time.monotonic() - started:.0f} s", flush=True
        )
        folder = self._folder / f"{self._number}"
        _download(self._store, f"runs-{self._number}/", folder)
        return run.timeline.steps(), folder


def make_manifest(number: int, num_steps: int, max_nodes: int) -> Manifest:
    """A float32 run over the tiny model in the bucket."""
    secret = {"secretRef": {"name": upload.SECRET}}
    variables = {"OMP_NUM_THREADS": "1", "QLORA_TRACE": "1", "QLORA_FAULTS": f"{RUN_DIR}/{FILE_NAME}"}
    env = [{"name": name, "value": value} for name, value in variables.items()]
    training = {"maxSteps": num_steps, "globalBatchSize": GLOBAL_BATCH, "microBatchSize": 1, "maxLength": 32}
    spec = {
        "model": {"uri": f"s3://{BUCKET}/model", **secret},
        "dataset": {"uri": f"s3://{BUCKET}/train.jsonl", **secret},
        "output": {"uri": f"s3://{BUCKET}/runs-{number}", **secret},
        "quantization": {"computeDtype": "float32", "storageDtype": "float32"},
        "lora": {"r": 4, "alpha": 8},
        "training": {**training, "learningRate": 1e-3, "shardingStrategy": "FULL_SHARD"},
        "checkpoint": {"intervalSteps": CHECKPOINT_STEPS},
        "elasticPolicy": {"minNodes": 1, "maxNodes": max_nodes},
        "failurePolicy": {"maxFailures": 1000},
        "resourcesPerNode": {"requests": {"cpu": "100m"}, "limits": {"nvidia.com/gpu": 1, "memory": "3Gi"}},
        "podTemplate": {"spec": {"containers": [{"name": "trainer", "env": env}]}},
    }
    kind = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAFinetune"}
    return {**kind, "metadata": {"name": f"chaos-{number}"}, "spec": spec}


def prepare(folder: Path) -> tuple[Kubectl, upload.Store]:
    """Cluster, operator on its own node, model and data in the bucket, an empty namespace."""
    os.environ["CLUSTER_NAME"] = NAME
    cluster("up", "--nodes", str(MAX_NODES + 1), "--gpus", "1", quiet=False)
    kubectl = Kubectl(Path(json.loads(cluster("status"))["kubeconfig"]), NAMESPACE)
    kubectl.must("taint", "node", f"node{MAX_NODES + 1}", f"{TAINT}=:NoSchedule", "--overwrite")
    cluster(
        *("deploy", "--set", "timing.statusIntervalSeconds=0.2", "--set", "log.format=text"),
        *("--set-json", f'nodeSelector={{"kubernetes.io/hostname":"node{MAX_NODES + 1}"}}'),
        *("--set-json", f'tolerations=[{{"key":"{TAINT}","operator":"Exists"}}]'),
        quiet=False,
    )
    store = upload.Store.find()
    tiny.make_sources(folder)
    client = store.client()
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):  # of an earlier grid on this cluster
        client.create_bucket(Bucket=BUCKET)
    for path in (*(folder / "model").iterdir(), folder / "train.jsonl"):
        client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))
    return fresh_namespace(kubectl, store), store


def _download(store: upload.Store, prefix: str, folder: Path) -> None:
    client = store.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        for item in page.get("Contents", []):
            path = folder / item["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(BUCKET, item["Key"], str(path))


def run(cells: list[Cell], report: Report) -> None:
    """Carry the cells out."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        kubectl, store = prepare(Path(name))
        num_steps = STEPS_PER_CELL * min(len(cells), CELLS_PER_RUN)
        grid = KubeGrid(Path(name), kubectl, load(NAME), store, num_steps)
        carry_out(cells, CELLS_PER_RUN, lambda group: grid.strike(group, report))
