"""Settings from the environment, logs."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest

from qlora_operator.logs import JsonFormatter, run_name
from qlora_operator.settings import Settings

NEEDED = {"QLORA_TRAINER_IMAGE": "trainer:1", "QLORA_COORDINATOR_URL": "https://c"}


def test_every_kind_of_value() -> None:
    settings = Settings.from_environment(
        {
            **NEEDED,
            "QLORA_LEASE_SECONDS": "2.5",
            "QLORA_LISTEN_PORT": "9443",
            "QLORA_NAMESPACES": "a, b",
            "QLORA_CACHE_VOLUME": '{"hostPath": {"path": "/c"}}',
            "QLORA_LOG_LEVEL": "",
        }
    )
    assert (settings.lease_seconds, settings.listen_port, settings.namespaces) == (2.5, 9443, ("a", "b"))
    assert settings.cache_volume == {"hostPath": {"path": "/c"}} and settings.log_level == "INFO"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "set QLORA_TRAINER_IMAGE"),
        ({"QLORA_TRAINER_IMAGE": "x"}, "set QLORA_COORDINATOR_URL"),
        ({**NEEDED, "QLORA_LEASE_SECONDS": "soon"}, "QLORA_LEASE_SECONDS='soon'"),
        ({**NEEDED, "QLORA_CACHE_VOLUME": "{}"}, "a volume source such as"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings.from_environment(environment)


def test_the_chart_documents_every_default_of_the_timing() -> None:
    chart = Path(__file__).parents[3] / "charts" / "qlora-operator"
    timing = json.loads((chart / "values.schema.json").read_text())["properties"]["timing"]["properties"]
    stated = dict(re.findall(r"^  # (\w+): ([\d.]+)(?= |$)", (chart / "values.yaml").read_text(), re.MULTILINE))
    defaults = {item.name: str(item.default) for item in dataclasses.fields(Settings)}
    assert stated == {name: defaults[re.sub("([A-Z])", r"_\1", name).lower()] for name in timing}


def test_log_lines_carry_the_runs_name() -> None:
    token = run_name.set("ns/r")
    record = logging.LogRecord("a", logging.INFO, "", 0, "hello %s", ("you",), None)
    line = json.loads(JsonFormatter().format(record))
    run_name.reset(token)
    assert (line["run"], line["message"], line["level"]) == ("ns/r", "hello you", "info")
