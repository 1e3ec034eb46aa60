"""What Prometheus gets."""

import re
from pathlib import Path

from qlora_api.names import Reason
from qlora_api.run import AgentState, Membership, Report
from qlora_api.status import Progress, QLoRAFinetuneStatus, Restarts
from qlora_operator.metrics import Metrics, metric_name
from qlora_operator.state import Key, PodIdentity
from qlora_operator.table import RunTable

KEY = Key("ns", "r")
PROGRESS = Progress(
    step=5,
    total_steps=10,
    loss=1.0,
    eval_loss=1.1,
    learning_rate=1e-4,
    grad_norm=0.5,
    tokens=100,
    tokens_per_second=9.0,
    eta_seconds=3,
)
MEASURED = {"step_seconds": 0.5, "gpu_memory_bytes": 2048.0, "planned_gpu_bytes": 4096.0}


def metrics_of_a_run() -> Metrics:
    """One run with one agent that reports everything there is."""
    table = RunTable(known_since=0)
    report = Report(address="a", state=AgentState.RUNNING, progress=PROGRESS, metrics=MEASURED)
    table.receive(PodIdentity("ns", "r-qlora", "r-0-0", "uid"), report, 1)
    table.publish(Membership(generation=1, prepare=1), 1)
    metrics = Metrics(lambda: {KEY: table})
    lost = Restarts(disruptions=1, by_reason={Reason.POD_LOST: 1})
    metrics.count(KEY, QLoRAFinetuneStatus(), QLoRAFinetuneStatus(generation=1, restarts=lost))
    metrics.pass_seconds.observe(0.1)
    metrics.pass_errors.labels("ApiError").inc()
    return metrics


def test_every_series_is_documented() -> None:
    text = metrics_of_a_run().text().decode()
    assert 'qlora_run_loss{namespace="ns",run="r"} 1.0' in text
    for name, value in MEASURED.items():
        assert f'qlora_trainer_{name}{{namespace="ns",pod="r-0-0",run="r"}} {value}' in text
    exported = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    exported = {name for name in exported if not name.endswith("_created") and not name.startswith("qlora_trainer_")}
    documents = (Path(__file__).parents[3] / "docs/metrics.md").read_text().partition("# What the operator exports")[2]
    named = {name if name[0] != "_" else f"qlora_run{name}" for name in re.findall(r"`(_?[a-z_]+)`", documents)}
    assert len(exported) > 10 and exported <= named


def test_metric_names() -> None:
    assert metric_name("step_seconds/p50") == "qlora_trainer_step_seconds_p50"
