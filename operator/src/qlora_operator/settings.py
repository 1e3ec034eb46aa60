"""What the operator can be told from outside: one environment variable for each field, all read once at the start."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

PREFIX = "QLORA_"


@dataclass(frozen=True)
class Settings:
    """Field `lease_seconds` is read from QLORA_LEASE_SECONDS, and so on. Times are in seconds."""

    trainer_image: str  # for runs whose spec.image is empty
    coordinator_url: str  # base URL at which the pods reach this operator's coordinator
    ca_file: str = ""  # PEM bundle that signs tls_cert; copied into every run's ConfigMap
    tls_cert: str = ""  # both empty: plain HTTP, for tests on one machine
    tls_key: str = ""
    listen_port: int = 8443  # coordinator
    metrics_port: int = 8080  # plain: /metrics, /healthz, /readyz
    namespaces: tuple[str, ...] = ()  # empty: all
    log_level: str = "INFO"
    log_format: str = "json"  # or text

    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    cache_volume: dict[str, Any] = field(default_factory=lambda: {"emptyDir": {}}, hash=False)  # JSON volume source
    snapshot_size: str = ""  # sizeLimit of the memory volume; empty: bounded by the pod's memory limit
    priority_class: str = ""
    grace_period_seconds: int = 60  # between SIGTERM and SIGKILL of a pod
    toleration_seconds: int = 60  # of a node that is not ready: a silent pod is replaced long before, a survivor kept

    lease_seconds: float = 3.0  # an agent that has not reported for this long is left out
    drop_seconds: float = 1.0  # the same once its connection broke
    fresh_seconds: float = 1.6  # a standing agent must have reported within this to be published
    silent_seconds: float = 10.0  # its pod is replaced
    force_delete_seconds: float = 0.0  # past its grace, a pod stuck in Terminating is removed by force; 0: never
    settle_seconds: float = 0.3  # between preparing and publishing
    start_wait_seconds: float = 10.0  # at a fresh start: for the nodes beyond minNodes
    prepare_timeout_seconds: float = 120.0  # a member that does not stand by then has its pod replaced
    status_interval_seconds: float = 2.0  # between two writes that bring progress only
    suspend_grace_seconds: float = 120.0  # for the last checkpoint before a suspended run's pods are deleted
    # A node at fault is avoided so long after its last fault: a flaky one stays away over a night's run, one that was
    # only rebooted, or a new machine under an old name, is taken again within a run of days.
    avoid_seconds: float = 21600.0
    blocked_seconds: float = 300.0  # a run none of whose pods can start (image, Secret, storage) fails
    hang_floor_seconds: float = 180.0  # hung: nothing done for this and for hang_factor times the median step
    hang_factor: float = 20.0
    start_hang_seconds: float = 600.0  # the floor until the workers of a generation have done their first step
    resync_seconds: float = 30.0  # a run is looked at at least this often

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Settings":
        """Read QLORA_*; raises ValueError naming the variable when one is missing or malformed."""
        values: dict[str, Any] = {}
        for item in fields(cls):
            variable = PREFIX + item.name.upper()
            text = environment.get(variable, "")
            if not text:
                continue
            try:
                values[item.name] = _PARSERS.get(str(item.type), str)(text)
            except ValueError as error:
                raise ValueError(f"{variable}={text!r}: {error}") from error
        for required in ("trainer_image", "coordinator_url"):
            if required not in values:
                raise ValueError(f"set {PREFIX}{required.upper()}")
        return cls(**values)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_volume(text: str) -> dict[str, Any]:
    source = json.loads(text)
    if not isinstance(source, dict) or len(source) != 1:
        raise ValueError('a volume source such as {"hostPath": {"path": "/var/cache/qlora"}} is needed')
    return source


_PARSERS: dict[str, Any] = {
    str(int): int,
    str(float): float,
    str(tuple[str, ...]): _parse_names,
    str(dict[str, Any]): _parse_volume,
}
