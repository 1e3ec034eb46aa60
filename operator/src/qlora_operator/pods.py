"""Builders of a run's objects: ConfigMap, ServiceAccount, pods. Whole objects, deterministic names, no I/O.

* Pods meet the `restricted` pod security standard: not root, read-only root file system, no capabilities. Whatever is
  written goes to a volume: RUN_DIR (memory; survives container restarts), CACHE_DIR (operator setting), /tmp, /dev/shm.
* restartPolicy is Always: when PID 1 dies the kubelet restarts the container at once and the snapshots in RUN_DIR are
  still there. That a run is over is the operator's decision, carried out by deleting its pods.
* The pod's token has an audience of its own and no rights at the API server; Secrets are mounted, never read here.
* `spec.podTemplate` is merged last, like a strategic merge patch; identity (names, labels, account) cannot be changed.
"""

import json
from typing import Any
from urllib.parse import urlsplit

from qlora_api import names, run
from qlora_api.run import TrainConfig
from qlora_api.status import Slot
from qlora_api.types import S3Access
from qlora_operator.settings import Settings
from qlora_operator.state import Manifest, Run

USER = 65532
# A recovery asks for names: a lost answer costs one second, not five, a Service's name takes one question, not four
DNS_OPTIONS = [{"name": "ndots", "value": "2"}, {"name": "timeout", "value": "1"}, {"name": "attempts", "value": "3"}]
TOKEN_SECONDS = 3600
_ACCOUNT_FIELDS = ("serviceAccountName", "serviceAccount", "automountServiceAccountToken", "hostname", "subdomain")
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "env": "name",
    "imagePullSecrets": "name",
    "ports": "containerPort",
    "hostAliases": "ip",
}
APPENDED = ("tolerations", "topologySpreadConstraints", "envFrom", "sources")


def build_config(the_run: Run, ca_bundle: str) -> Manifest:
    """The ConfigMap that every pod mounts: config.json and the coordinator's CA."""
    config = TrainConfig(run=the_run.identity, spec=the_run.spec)
    data = {"config.json": json.dumps(config.to_wire(), indent=1, sort_keys=True), "ca.crt": ca_bundle}
    return {**_head(the_run, "ConfigMap", names.config_name(the_run.identity.name)), "data": data}


def build_account(the_run: Run) -> Manifest:
    """The run's own ServiceAccount: its name ties a token to the run; it has no rights."""
    head = _head(the_run, "ServiceAccount", names.config_name(the_run.identity.name))
    return {**head, "automountServiceAccountToken": False}


def build_pod(the_run: Run, slot: Slot, avoided_nodes: list[str], settings: Settings) -> Manifest:
    """The pod of a place. A pure function of run, place and settings, apart from the nodes to avoid."""
    name = names.pod_name(the_run.identity.name, slot.index, slot.incarnation)
    head = _head(the_run, "Pod", name)
    own_labels = {
        **head["metadata"]["labels"],
        names.LABEL_INDEX: str(slot.index),
        names.LABEL_INCARNATION: str(slot.incarnation),
    }
    spec: Manifest = {
        "restartPolicy": "Always",
        "serviceAccountName": names.config_name(the_run.identity.name),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "dnsConfig": {"options": DNS_OPTIONS},
        "terminationGracePeriodSeconds": settings.grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "affinity": _affinity(the_run.identity.name, avoided_nodes),
        "tolerations": _tolerations(settings.toleration_seconds),
        "containers": [_container(the_run, settings)],
        "volumes": _volumes(the_run, settings),
    }
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    patch = the_run.spec.pod_template
    labels = {**dict(the_run.priority_labels), **patch.metadata.labels, **own_labels}
    metadata = {**head["metadata"], "labels": labels}
    if annotations := patch.metadata.annotations:
        metadata["annotations"] = annotations
    allowed = {key: value for key, value in patch.spec.items() if key not in _ACCOUNT_FIELDS}
    return {**head, "metadata": metadata, "spec": merge(spec, allowed)}


def merge(base: Manifest, patch: Manifest) -> Manifest:
    """Strategic merge: maps merge, lists of named things merge by name, null removes, everything else replaces."""
    merged = dict(base)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        elif isinstance(value, list) and isinstance(merged.get(key), list) and key in MERGE_KEYS:
            merged[key] = _merge_named(merged[key], value, MERGE_KEYS[key])
        elif isinstance(value, list) and isinstance(merged.get(key), list) and key in APPENDED:
            merged[key] = [*merged[key], *value]
        else:
            merged[key] = value
    return merged


def _merge_named(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    merged = {item.get(key): item for item in base}
    for item in patch:
        known = merged.get(item.get(key))
        merged[item.get(key)] = merge(known, item) if known is not None else item
    return list(merged.values())


def _head(the_run: Run, kind: str, name: str) -> Manifest:
    owner = {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "name": the_run.identity.name,
        "uid": the_run.identity.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
    labels = {names.LABEL_RUN: the_run.identity.name, names.LABEL_MANAGED_BY: names.FIELD_MANAGER}
    metadata = {"name": name, "namespace": the_run.identity.namespace, "labels": labels, "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata}


def _container(the_run: Run, settings: Settings) -> Manifest:
    resources = the_run.spec.resources_per_node
    return {
        "name": names.CONTAINER,
        "image": the_run.spec.image or settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy,
        "env": _environment(settings),
        "resources": {"limits": dict(resources.limits), "requests": dict(resources.requests)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": run.TERMINATION_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": run.CONFIG_PATH.rsplit("/", 1)[0], "readOnly": True},
            {"name": "token", "mountPath": run.TOKEN_PATH.rsplit("/", 1)[0], "readOnly": True},
            {"name": "run", "mountPath": run.RUN_DIR},
            {"name": "cache", "mountPath": run.CACHE_DIR},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
            *_secret_mounts(the_run),
            *_claim_mounts(the_run),
        ],
    }


def _environment(settings: Settings) -> list[Manifest]:
    """The contract of api/run.py, and homes for what libraries write: the root file system is read-only."""
    plain = {
        run.ENV_COORDINATOR: settings.coordinator_url,
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/.cache",
        "MPLCONFIGDIR": "/tmp/matplotlib",
        "HF_HOME": f"{run.CACHE_DIR}/huggingface",
        "TRITON_CACHE_DIR": f"{run.CACHE_DIR}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{run.CACHE_DIR}/inductor",
    }
    downward = {
        run.ENV_POD_NAME: "metadata.name",
        run.ENV_POD_UID: "metadata.uid",
        run.ENV_POD_IP: "status.podIP",
        run.ENV_NODE_NAME: "spec.nodeName",
    }
    fields = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in downward.items()]
    return [*({"name": name, "value": value} for name, value in plain.items()), *fields]


def _volumes(the_run: Run, settings: Settings) -> list[Manifest]:
    token = {"path": run.TOKEN_PATH.rsplit("/", 1)[1], "audience": run.TOKEN_AUDIENCE}
    memory: Manifest = {"medium": "Memory"}
    if settings.snapshot_size:
        memory = {**memory, "sizeLimit": settings.snapshot_size}
    return [
        {"name": "config", "configMap": {"name": names.config_name(the_run.identity.name)}},
        {
            "name": "token",
            "projected": {"sources": [{"serviceAccountToken": {**token, "expirationSeconds": TOKEN_SECONDS}}]},
        },
        {"name": "run", "emptyDir": memory},
        {"name": "cache", **settings.cache_volume},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
        *(
            {"name": f"secret-{part}", "secret": {"secretName": access.secret_ref.name}}
            for part, access in _accesses(the_run).items()
            if access.secret_ref is not None
        ),
        *(
            {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
            for number, claim in enumerate(_claims(the_run))
        ),
    ]


def _accesses(the_run: Run) -> dict[str, S3Access]:
    spec = the_run.spec
    return {"model": spec.model, "dataset": spec.dataset, "output": spec.output}


def _secret_mounts(the_run: Run) -> list[Manifest]:
    return [
        {"name": f"secret-{part}", "mountPath": f"{run.SECRETS_DIR}/{part}", "readOnly": True}
        for part, access in _accesses(the_run).items()
        if access.secret_ref is not None
    ]


def _claims(the_run: Run) -> list[str]:
    """Names of the claims behind pvc:// URIs, each once."""
    spec = the_run.spec
    uris = [urlsplit(uri) for uri in (spec.model.uri, spec.dataset.uri, spec.dataset.eval_uri or "")]
    return sorted({uri.netloc for uri in uris if uri.scheme == "pvc"})


def _claim_mounts(the_run: Run) -> list[Manifest]:
    return [
        {"name": f"claim-{number}", "mountPath": f"{run.PVC_DIR}/{claim}", "readOnly": True}
        for number, claim in enumerate(_claims(the_run))
    ]


def _affinity(name: str, avoided_nodes: list[str]) -> Manifest:
    """Wishes, not demands: one node for each pod, none of the nodes at fault; a run on the only node still starts."""
    term = {"labelSelector": {"matchLabels": {names.LABEL_RUN: name}}, "topologyKey": "kubernetes.io/hostname"}
    spread = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 50, "podAffinityTerm": term}]}
    affinity: Manifest = {"podAntiAffinity": spread}
    if avoided_nodes:
        match = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": sorted(avoided_nodes)}
        wish = {"weight": 100, "preference": {"matchExpressions": [match]}}
        affinity["nodeAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": [wish]}
    return affinity


def _tolerations(seconds: int) -> list[Manifest]:
    """Leave a lost node after so many seconds, not after the default of 300."""
    common = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
    return [{"key": f"node.kubernetes.io/{taint}", **common} for taint in ("not-ready", "unreachable")]
