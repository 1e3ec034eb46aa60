"""What pods look like: secure, complete, deterministic, and patched as users ask."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.operator.build import SETTINGS, run

from qlora_api import run as contract
from qlora_api.run import parse_config
from qlora_api.status import Slot
from qlora_operator import pods
from qlora_operator.settings import Settings
from qlora_operator.state import Manifest


def build(settings: Settings = SETTINGS, avoided: list[str] | None = None, **spec: Any) -> Manifest:
    return pods.build_pod(run(**spec), Slot(index=1, incarnation=2), avoided or [], settings)


def container(pod: Manifest) -> Manifest:
    (found,) = (item for item in pod["spec"]["containers"] if item["name"] == "trainer")
    return dict(found)


def mounts(pod: Manifest) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in container(pod)["volumeMounts"]}


def volume(pod: Manifest, name: str) -> Manifest:
    return dict(next(item for item in pod["spec"]["volumes"] if item["name"] == name))


def test_identity() -> None:
    metadata = build()["metadata"]
    assert metadata["name"] == "r-1-2" and metadata["namespace"] == "ns"
    assert metadata["labels"]["qlora.dev/run"] == "r" and metadata["labels"]["qlora.dev/index"] == "1"
    (owner,) = metadata["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("QLoRAFinetune", "run-uid", True)


def test_it_is_restricted() -> None:
    pod = build()
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and pod["spec"]["securityContext"]["runAsUser"] == 65532
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container(pod)["securityContext"]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert pod["spec"]["automountServiceAccountToken"] is False


def test_everything_that_is_written_has_a_volume() -> None:
    pod = build()
    environment = {item["name"]: item.get("value", "") for item in container(pod)["env"]}
    writable = [path for path, name in mounts(pod).items() if name in ("run", "cache", "tmp", "shm")]
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"):
        assert any(environment[name].startswith(path) for path in writable), name
    assert volume(pod, "run")["emptyDir"] == {"medium": "Memory"} and mounts(pod)[contract.RUN_DIR] == "run"
    assert volume(build(Settings("i", "u", snapshot_size="2Gi")), "run")["emptyDir"]["sizeLimit"] == "2Gi"


def test_the_contract_of_the_environment() -> None:
    env = {item["name"]: item for item in container(build())["env"]}
    assert env[contract.ENV_COORDINATOR]["value"] == SETTINGS.coordinator_url
    paths = {name: env[name]["valueFrom"]["fieldRef"]["fieldPath"] for name in env if "valueFrom" in env[name]}
    assert paths == {
        contract.ENV_POD_NAME: "metadata.name",
        contract.ENV_POD_UID: "metadata.uid",
        contract.ENV_POD_IP: "status.podIP",
        contract.ENV_NODE_NAME: "spec.nodeName",
    }


def test_the_token_has_its_own_audience() -> None:
    (source,) = volume(build(), "token")["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == contract.TOKEN_AUDIENCE
    assert mounts(build())[contract.TOKEN_PATH.rsplit("/", 1)[0]] == "token"


def test_secrets_are_mounted_by_part_and_claims_by_name() -> None:
    pod = build(
        output={"uri": "s3://out/x", "secretRef": {"name": "keys"}},
        model={"uri": "pvc://models/llama"},
        dataset={"uri": "pvc://models/data", "evalUri": "pvc://more/x"},
    )
    assert mounts(pod)[f"{contract.SECRETS_DIR}/output"] == "secret-output"
    assert volume(pod, "secret-output")["secret"] == {"secretName": "keys"}
    assert f"{contract.SECRETS_DIR}/model" not in mounts(pod)
    claims = {
        path: volume(pod, name)["persistentVolumeClaim"]["claimName"]
        for path, name in mounts(pod).items()
        if name.startswith("claim-")
    }
    assert claims == {f"{contract.PVC_DIR}/models": "models", f"{contract.PVC_DIR}/more": "more"}


def test_image_cache_priority_and_pull_secrets() -> None:
    settings = Settings(
        "default:1",
        "u",
        cache_volume={"hostPath": {"path": "/c"}},
        priority_class="low",
        image_pull_secrets=("regcred",),
    )
    pod = build(settings)
    assert container(pod)["image"] == "default:1" and container(build(settings, image="own:2"))["image"] == "own:2"
    assert volume(pod, "cache")["hostPath"] == {"path": "/c"} and pod["spec"]["priorityClassName"] == "low"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "regcred"}]


def test_nodes_at_fault_are_avoided_softly() -> None:
    assert "nodeAffinity" not in build()["spec"]["affinity"]
    affinity = build(avoided=["b", "a"])["spec"]["affinity"]
    (wish,) = affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["preference"]["matchExpressions"][0]["values"] == ["a", "b"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in affinity["podAntiAffinity"]


def test_the_template_is_merged_by_name_and_cannot_take_the_identity() -> None:
    patch = {
        "metadata": {"labels": {"team": "x", "qlora.dev/run": "other"}, "annotations": {"note": "y"}},
        "spec": {
            "serviceAccountName": "admin",
            "automountServiceAccountToken": True,
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "enableServiceLinks": None,
            "dnsConfig": {"options": [{"name": "ndots", "value": "5"}]},
            "containers": [
                {"name": "trainer", "env": [{"name": "HOME", "value": "/h"}, {"name": "NCCL_DEBUG", "value": "INFO"}]},
                {"name": "sidecar", "image": "s"},
            ],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        },
    }
    pod = build(podTemplate=patch)
    assert pod["metadata"]["labels"]["team"] == "x" and pod["metadata"]["labels"]["qlora.dev/run"] == "r"
    assert pod["metadata"]["annotations"] == {"note": "y"}
    spec = pod["spec"]
    assert spec["serviceAccountName"] == "r-qlora" and spec["automountServiceAccountToken"] is False
    assert spec["nodeSelector"] == {"gpu": "h200"} and len(spec["tolerations"]) == 3
    assert spec["dnsConfig"] == {"options": [{"name": "ndots", "value": "5"}]}
    assert "enableServiceLinks" not in spec and [c["name"] for c in spec["containers"]] == ["trainer", "sidecar"]
    env = {item["name"]: item.get("value") for item in container(pod)["env"]}
    assert (env["HOME"], env["NCCL_DEBUG"], env["HF_HOME"]) == ("/h", "INFO", "/cache/huggingface")
    assert volume(pod, "tmp")["emptyDir"] == {"sizeLimit": "1Gi"}


def test_the_config_is_what_the_trainer_parses() -> None:
    manifest = pods.build_config(run(), "-----BEGIN")
    assert manifest["data"]["ca.crt"] == "-----BEGIN"
    config = parse_config(manifest["data"]["config.json"])
    assert config.run.name == "r" and config.spec == run().spec
    assert json.loads(manifest["data"]["config.json"])["spec"]["model"]["uri"] == "hf://org/model"


def test_the_account_has_no_token_and_the_runs_name() -> None:
    account = pods.build_account(run())
    assert account["metadata"]["name"] == "r-qlora" and account["automountServiceAccountToken"] is False


keys = st.sampled_from(["a", "b", "c"])
trees = st.recursive(st.integers() | st.text(max_size=3), lambda t: st.dictionaries(keys, t, max_size=3), max_leaves=8)
maps = st.dictionaries(keys, trees, max_size=3)


@given(maps, maps)
def test_merging_keeps_the_base_and_applies_twice_as_once(base: Manifest, patch: Manifest) -> None:
    before = json.dumps(base)
    once = pods.merge(base, patch)
    assert json.dumps(base) == before and pods.merge(once, patch) == once and pods.merge(base, {}) == base


@pytest.mark.parametrize("field", ["containers", "volumes", "env"])
def test_named_lists_merge_by_name(field: str) -> None:
    merged = pods.merge({field: [{"name": "a", "x": 1}]}, {field: [{"name": "a", "y": 2}, {"name": "b"}]})
    assert merged[field] == [{"name": "a", "x": 1, "y": 2}, {"name": "b"}]
