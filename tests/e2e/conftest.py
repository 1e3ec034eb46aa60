"""The real cluster with the operator in it, the bucket filled and the Secret there: once for the session.

Rules: a test applies resources and looks at what the API server and the bucket say, as a user would; it deletes what it
applied; what runs for long is shared.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hack.demo import upload, watch
from hack.demo.kubectl import Kubectl, Manifest, cluster, is_local
from tests.e2e.support import EXAMPLES, Applied, fresh_namespace

NAMESPACE = "qlora-e2e"
BLOCKED_SECONDS = 20  # until a run that cannot start fails; the default is 300


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "local: kills or cuts nodes of the local cluster; not chosen by CLUSTER=current")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the local cluster's tests out where another is asked for; pytest counts them as deselected."""
    if is_local():
        return
    left_out = [item for item in items if item.get_closest_marker("local")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def store() -> upload.Store:
    """The object store, with model and data in the examples' bucket."""
    cluster("up")
    found = upload.Store.find()
    upload.upload(found.client())
    return found


@pytest.fixture(scope="session")
def kubectl(store: upload.Store) -> Kubectl:
    """kubectl in a fresh namespace of the cluster, with the operator running and the Secret there."""
    cluster(
        *("deploy", "--set", "timing.statusIntervalSeconds=0.5"),
        *("--set", f"timing.blockedSeconds={BLOCKED_SECONDS}", "--set", "log.format=text"),
    )
    return fresh_namespace(Kubectl.find(NAMESPACE), store)


@pytest.fixture
def apply(kubectl: Kubectl) -> Iterator[Any]:
    """A function: apply an example (a file's name) or a manifest, and follow it; deleted after the test."""
    applied: list[Applied] = []

    def apply_it(what: str | Manifest) -> Applied:
        manifest: Manifest = yaml.safe_load(upload.example(EXAMPLES / what)) if isinstance(what, str) else what
        answer = kubectl.apply(manifest)
        assert answer.returncode == 0, answer.stderr
        name = manifest["metadata"]["name"]
        followed = watch.RunWatch(kubectl, name)
        followed.__enter__()
        applied.append(Applied(kubectl, name, followed))
        return applied[-1]

    yield apply_it
    for run in applied:
        run.followed.__exit__()
        kubectl.delete("qft", run.name)
