"""Prometheus metrics: what runs report, what happened to them, and how the operator itself is doing.

Series of a run vanish with it: gauges are read from the coordinator's table when they are scraped, counters are dropped
by `forget`.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from qlora_api.status import QLoRAFinetuneStatus
from qlora_operator.state import Key
from qlora_operator.table import RunTable

_LABELS = ("namespace", "run")
_POD_LABELS = (*_LABELS, "pod")
_PROGRESS = {
    "step": "Optimizer steps done",
    "total_steps": "Optimizer steps in all",
    "loss": "Training loss of the last step, nats a token",
    "eval_loss": "Newest evaluation loss, nats a token",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
    "tokens": "Tokens trained on",
    "tokens_per_second": "Tokens a second over all nodes",
    "eta_seconds": "Seconds to go",
}


class Metrics:
    """The registry and the counters that passes feed."""

    def __init__(self, tables: Callable[[], dict[Key, RunTable]]) -> None:
        self.registry = CollectorRegistry()
        self.pass_seconds = Histogram(
            "qlora_reconcile_seconds",
            "Duration of a pass over one run",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self.registry,
        )
        self.pass_errors = Counter(
            "qlora_reconcile_errors", "Passes that failed and are tried again", ("error",), registry=self.registry
        )
        self.generations = Counter(
            "qlora_generations", "Membership generations published", _LABELS, registry=self.registry
        )
        self.restarts = Counter(
            "qlora_restarts", "Members lost, by reason", (*_LABELS, "reason"), registry=self.registry
        )
        self.registry.register(_RunCollector(tables))

    def count(self, key: Key, old: QLoRAFinetuneStatus, new: QLoRAFinetuneStatus) -> None:
        """Count what a status write brought."""
        if new.generation > old.generation:
            self.generations.labels(*key).inc(new.generation - old.generation)
        for reason, number in new.restarts.by_reason.items():
            more = number - old.restarts.by_reason.get(reason, 0)
            if more > 0:
                self.restarts.labels(*key, reason).inc(more)

    def forget(self, key: Key) -> None:
        """The run is gone: its counters go with it."""
        for counter in (self.generations, self.restarts):
            counter.remove_by_labels(dict(zip(_LABELS, key, strict=True)))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _RunCollector(Collector):
    def __init__(self, tables: Callable[[], dict[Key, RunTable]]) -> None:
        self._tables = tables

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}

        def gauge(name: str, help_text: str, labels: tuple[str, ...], values: tuple[str, ...], value: float) -> None:
            family = families.setdefault(name, GaugeMetricFamily(name, help_text, labels=labels))
            family.add_metric(values, value)

        for key, table in self._tables().items():
            reports = [entry.report for entry in table.entries.values() if entry.report.progress is not None]
            newest = max((r.progress for r in reports if r.progress), key=lambda progress: progress.step, default=None)
            for field, help_text in _PROGRESS.items() if newest is not None else ():
                if (value := getattr(newest, field)) is not None:
                    gauge(f"qlora_run_{field}", help_text, _LABELS, key, float(value))
            if table.answer is not None:
                gauge("qlora_run_generation", "Membership generation", _LABELS, key, table.answer.generation)
                gauge("qlora_run_members", "Members of the generation", _LABELS, key, len(table.answer.members))
            for entry in table.entries.values():
                for name, value in entry.report.metrics.items():
                    pod = (*key, entry.pod.pod_name)
                    gauge(metric_name(name), "Reported by the trainer, see docs/metrics.md", _POD_LABELS, pod, value)
        yield from families.values()


def metric_name(name: str) -> str:
    """A trainer's metric name as Prometheus takes it, with the product's prefix."""
    return "qlora_trainer_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
