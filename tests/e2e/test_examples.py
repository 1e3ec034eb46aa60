"""Every file in examples/ does what it says, on the real cluster."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hack.demo import adapter, upload, watch
from hack.demo.kubectl import Kubectl
from hack.demo.spot import Spot
from tests.e2e.support import EXAMPLES, Applied

CHECKED_ONLY = ("fsdp-on-gpus.yaml", "spot-gpus.yaml", "s3-secret.yaml", "smollm2.yaml")
"""Real GPUs, twice; placeholders; `make demo` runs it."""
RUN = ("minimal.yaml", "elastic.yaml", "suspend.yaml")


def test_every_example_has_its_test() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.yaml")) == sorted(CHECKED_ONLY + RUN)


@pytest.mark.parametrize("name", CHECKED_ONLY)
def test_the_api_server_takes_it(kubectl: Kubectl, name: str) -> None:
    kubectl.must("apply", "--dry-run=server", "-f", str(EXAMPLES / name))


def require_adapter(run: watch.Run, store: upload.Store) -> dict[str, Any]:
    """The adapter in the bucket is what status and manifest say; the manifest."""
    artifacts = watch.status(run)["artifacts"]
    manifest = adapter.read_manifest(store.client(), artifacts["manifestUri"])
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: path for path in adapter.fetch(store.client(), artifacts["adapterUri"], Path(folder))}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
        assert adapter.sha256(files["adapter_model.safetensors"]) == artifacts["adapterSha256"]
    return manifest


def test_minimal(apply: Any, store: upload.Store) -> None:
    run: Applied = apply("minimal.yaml")
    done = run.succeeded()
    status = watch.status(done)
    assert watch.condition(done, "Complete")["reason"] == "AdapterUploaded"  # type: ignore[index]
    assert status["progress"]["step"] == status["progress"]["totalSteps"] > 0
    assert status["restarts"] == {"disruptions": 0, "failures": 0, "byReason": {}}
    require_adapter(done, store)
    run.without_pods()


@pytest.mark.local
def test_elastic_goes_on_when_a_node_is_killed_and_takes_it_back(apply: Any, store: upload.Store) -> None:
    run: Applied = apply("elastic.yaml")
    before = run.until("two nodes training", lambda run: watch.active(run) == 2 and watch.step(run) >= 4)
    spot = Spot.choose(run.kubectl, before)
    killed = spot.kill(before)
    try:
        after = run.until("steps on one node", killed.is_recovered)
        assert watch.status(after)["generation"] > killed.generation
        assert watch.status(after)["restarts"]["failures"] == 0
    finally:
        spot.start()
    done = run.succeeded()
    status = watch.status(done)
    assert status["progress"]["step"] == 20
    assert status["restarts"]["disruptions"] >= 1
    assert status["restarts"]["failures"] == 0, status["lastFailure"]
    assert status["artifacts"]["evalLossAfter"] < status["artifacts"]["evalLossBefore"]
    require_adapter(done, store)
    run.without_pods()


def test_suspend_frees_the_nodes_and_resumes_at_its_step(apply: Any, store: upload.Store) -> None:
    run: Applied = apply("suspend.yaml")
    run.until("suspended", lambda run: watch.word(run) == "Suspended", 60)
    assert run.pods() == []
    switch(run, False)
    run.until("some steps", lambda run: watch.step(run) >= 4)
    switch(run, True)
    stopped = run.until("suspended again", lambda run: watch.word(run) == "Suspended")
    run.without_pods()
    saved = watch.status(stopped)["checkpoint"]["step"]
    assert 4 <= saved < 12
    assert saved == watch.step(stopped), "the last checkpoint is of the last step"
    switch(run, False)
    resumed = run.until("a step", lambda run: watch.word(run) == "Running" and watch.step(run) > saved)
    assert watch.step(resumed) >= saved
    done = run.succeeded()
    assert watch.status(done)["progress"]["step"] == 12
    require_adapter(done, store)


def switch(run: Applied, suspended: bool) -> None:
    """Set spec.suspend."""
    word = "true" if suspended else "false"
    run.kubectl.must("patch", "qft", run.name, "--type=merge", "-p", f'{{"spec":{{"suspend":{word}}}}}')
