"""The chart: what its templates render, what its schema refuses, and what a real API server makes of it."""

import dataclasses
import json
import ssl
import subprocess
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml
from hack.demo.kubectl import ROOT, Kubectl, program

from qlora_operator.settings import Settings

CHART = ROOT / "charts" / "qlora-operator"
NAMESPACE = "qlora-system"
Objects = dict[str, dict[str, Any]]


def template(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [program("helm"), "template", "qlora-operator", str(CHART), "--namespace", NAMESPACE, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def render(*settings: str) -> Objects:
    """KIND/NAME -> object, with `--set` for each setting."""
    done = template(*(word for setting in settings for word in ("--set-json", setting)))
    assert done.returncode == 0, done.stderr
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in yaml.safe_load_all(done.stdout) if item}


def environment(objects: Objects) -> dict[str, str]:
    container = objects["Deployment/qlora-operator"]["spec"]["template"]["spec"]["containers"][0]
    return {variable["name"]: variable["value"] for variable in container["env"]}


def rules(objects: Objects, key: str = "ClusterRole/qlora-operator") -> set[tuple[str, str, str]]:
    """(group, resource, verb) of a role."""
    return {
        (group, resource, verb)
        for rule in objects[key]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_lint() -> None:
    done = subprocess.run(
        [program("helm"), "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_operator_reads_what_the_chart_sets() -> None:
    settings = Settings.from_environment(environment(render()))
    defaults = Settings(settings.trainer_image, settings.coordinator_url)
    assert settings == dataclasses.replace(
        defaults,
        trainer_image="qlora-trainer:0.1.0",
        coordinator_url="https://qlora-operator.qlora-system.svc:8443",
        ca_file="/etc/qlora-operator/tls/ca.crt",
        tls_cert="/etc/qlora-operator/tls/tls.crt",
        tls_key="/etc/qlora-operator/tls/tls.key",
    )


def test_every_setting_of_the_operator_can_be_set() -> None:
    timing = json.loads((CHART / "values.schema.json").read_text())["properties"]["timing"]["properties"]
    given = dict.fromkeys(timing, 7.5)
    objects = render(
        f"timing={json.dumps(given)}",
        'trainer.snapshotSize="2Gi"',
        'trainer.priorityClass="spot"',
        'trainer.imagePullSecrets=["a","b"]',
        'trainer.cacheVolume={"hostPath":{"path":"/var/cache/qlora"}}',
        'watchNamespaces=["team-a","team-b"]',
    )
    variables = environment(objects)
    assert set(variables) == {f"QLORA_{item.name.upper()}" for item in dataclasses.fields(Settings)}
    settings = Settings.from_environment(variables)
    assert all(getattr(settings, _snake(name)) == value for name, value in given.items())
    assert settings.cache_volume == {"hostPath": {"path": "/var/cache/qlora"}}
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.image_pull_secrets == ("a", "b")


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def test_the_pod_meets_the_restricted_standard() -> None:
    deployment = render()["Deployment/qlora-operator"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= set(container["resources"])
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= set(container)


def test_the_operator_may_do_what_it_does_and_no_more() -> None:
    assert rules(render()) == {
        ("authentication.k8s.io", "tokenreviews", "create"),
        *(("qlora.dev", "qlorafinetunes", verb) for verb in ("get", "list", "watch", "delete")),
        ("qlora.dev", "qlorafinetunes/status", "update"),
        *(("", "pods", verb) for verb in ("list", "watch", "create", "delete")),
        *(("", kind, verb) for kind in ("configmaps", "serviceaccounts") for verb in ("create", "patch")),
        ("events.k8s.io", "events", "create"),
        ("", "events", "list"),
    }


def test_with_namespaces_only_token_reviews_are_cluster_wide() -> None:
    objects = render('watchNamespaces=["team-a"]')
    assert rules(objects) == {("authentication.k8s.io", "tokenreviews", "create")}
    assert objects["Role/qlora-operator"]["metadata"]["namespace"] == "team-a"
    assert ("", "pods", "create") in rules(objects, "Role/qlora-operator")
    assert objects["RoleBinding/qlora-operator"]["subjects"][0]["namespace"] == NAMESPACE


def test_the_certificate_is_for_the_service_and_signed_by_the_ca(tmp_path: Path) -> None:
    objects = render()
    (tmp_path / "key").write_bytes(b64decode(objects["Secret/qlora-operator-tls"]["data"]["tls.key"]))
    data = {name: b64decode(text).decode() for name, text in objects["Secret/qlora-operator-tls"]["data"].items()}
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cadata=data["ca.crt"])
    (tmp_path / "cert").write_text(data["tls.crt"])
    server.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    handshake(server, client, "qlora-operator.qlora-system.svc")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "elsewhere.svc")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, hostname: str) -> None:
    """A TLS handshake in memory; raises what a client that connects to `hostname` would see."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=hostname)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue


def test_a_given_secret_replaces_the_one_that_the_chart_makes() -> None:
    objects = render('coordinator.tls.existingSecret="mine"')
    assert not [key for key in objects if key.startswith("Secret/")]
    volumes = objects["Deployment/qlora-operator"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "mine"}} in volumes


def test_the_crd_is_kept_or_left_out_as_asked() -> None:
    name = "CustomResourceDefinition/qlorafinetunes.qlora.dev"
    assert render()[name]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not render("crds.keep=false")[name]["metadata"]["annotations"]
    assert name not in render("crds.enabled=false")


def test_the_network_policy_lets_trainers_in() -> None:
    assert "NetworkPolicy/qlora-operator" not in render()
    policy = render("networkPolicy.enabled=true", "networkPolicy.metricsFrom=[{}]")["NetworkPolicy/qlora-operator"]
    assert [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]] == ["coordinator", "metrics"]


def test_a_digest_takes_the_tags_place() -> None:
    digest = f"sha256:{'a' * 64}"
    objects = render(f'image={{"repository":"r/o","tag":"1","digest":"{digest}"}}', f'trainer.image.digest="{digest}"')
    container = objects["Deployment/qlora-operator"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == f"r/o@{digest}"
    assert environment(objects)["QLORA_TRAINER_IMAGE"] == f"qlora-trainer@{digest}"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("replicas=2", "replicas"),
        ("trainer.imge={}", "imge"),
        ("timing.leaseSecs=3", "leaseSecs"),
        ("timing.leaseSeconds=0", "leaseSeconds"),
        ('timing.leaseSeconds="0.0"', "leaseSeconds"),
        ('log.level="LOUD"', "level"),
        ("coordinator.port=0", "port"),
        ("image.tag=1", "tag"),
        ('trainer.image.digest="1234"', "digest"),
    ],
)
def test_a_wrong_value_is_refused(setting: str, named: str) -> None:
    done = template("--set-json", setting)
    assert done.returncode != 0
    assert named in done.stderr


def test_installed_upgraded_and_removed_on_a_real_api_server(kubectl: Kubectl) -> None:
    system = dataclasses.replace(kubectl, namespace=NAMESPACE)
    install = ("upgrade", "--install", "qlora-operator", str(CHART), "--namespace", NAMESPACE, "--create-namespace")
    # the CRD is there already, applied by hand: the chart must be able to take it over
    first = system.helm(*install, "--take-ownership", "--force-conflicts")
    assert first.returncode == 0, first.stderr
    made = system.get("secret", "qlora-operator-tls")
    second = system.helm(*install, "--set", "log.level=DEBUG")
    assert second.returncode == 0, second.stderr
    kept = system.get("secret", "qlora-operator-tls")
    assert made and kept and kept["data"] == made["data"]
    account = f"--as=system:serviceaccount:{NAMESPACE}:qlora-operator"
    assert system.run("auth", "can-i", "create", "pods", account, "-A").stdout.strip() == "yes"
    for verb in ("get", "list", "watch", "create", "patch", "delete"):
        assert system.run("auth", "can-i", verb, "secrets", account, "-A").stdout.strip() == "no"
    removed = system.helm("uninstall", "qlora-operator", "--namespace", NAMESPACE)
    assert removed.returncode == 0, removed.stderr
    assert system.get("crd", "qlorafinetunes.qlora.dev") is not None
    assert system.get("clusterrole", "qlora-operator") is None
