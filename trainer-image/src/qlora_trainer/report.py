"""What a run tells about itself: the history of its losses, their picture, the model card.

Rules: the history travels with the state (snapshots, checkpoints), so a restart loses none of it; it keeps at most
MAX_POINTS training points, halving its resolution when it is full. Nothing here reads a clock.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import unquote, urlsplit

from qlora_api.layout import ADAPTERS, MANIFEST, RunLayout
from qlora_api.run import TrainConfig
from qlora_api.types import QLoRAFinetuneSpec

MAX_POINTS = 1000
ADAPTER_KEY = f"{ADAPTERS}/GENERATION"  # in the card until it is uploaded: only then the generation is known


@dataclass
class History:
    """Training points (step, loss, learning rate, gradient norm) and evaluations (step, loss), steps from 1.

    `by_length` has an evaluation's losses by the samples' lengths: (step, {tokens of the longest: loss}).
    """

    every: int = 1
    points: list[tuple[int, float, float, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    by_length: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    num_tokens: int = 0  # trained on, padding not counted

    def add(self, step: int, loss: float, rate: float, norm: float) -> None:
        """One optimizer step."""
        if step % self.every == 0:
            self.points.append((step, round(loss, 6), float(f"{rate:.6g}"), float(f"{norm:.6g}")))
        if len(self.points) > MAX_POINTS:
            self.every *= 2
            self.points = [point for point in self.points if point[0] % self.every == 0]

    def add_evaluation(self, step: int, loss: float, by_length: Mapping[int, float] | None = None) -> None:
        """One evaluation after `step` steps; one at the same step replaces the earlier."""
        self.evaluations = [*(e for e in self.evaluations if e[0] != step), (step, round(loss, 6))]
        rounded = {longest: round(loss, 6) for longest, loss in (by_length or {}).items()}
        self.by_length = [*(e for e in self.by_length if e[0] != step), (step, rounded)]

    def losses_by_length(self, step: int) -> dict[str, float]:
        """The losses of the evaluation after `step` steps by the samples' lengths, by the names of docs/metrics.md."""
        found = dict(self.by_length).get(step, {})
        return {f"eval_loss_to_{longest}_tokens": loss for longest, loss in found.items()}

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after `step` steps is known."""
        return any(at == step for at, _ in self.evaluations)

    def stopped_improving(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations brought no better loss than the ones before."""
        if patience is None or len(self.evaluations) <= patience:
            return False
        losses = [loss for _, loss in self.evaluations]
        return min(losses[-patience:]) >= min(losses[:-patience])

    @property
    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest loss after training began, the first of equals; None without a finite one."""
        trained = [e for e in self.evaluations if e[0] > 0 and math.isfinite(e[1])]
        return min(trained, key=lambda e: e[1], default=None)

    @property
    def eval_loss_before(self) -> float | None:
        return self.evaluations[0][1] if self.evaluations and self.evaluations[0][0] == 0 else None

    @property
    def eval_loss(self) -> float | None:
        return self.evaluations[-1][1] if self.evaluations else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> "History":
        points = [(int(s), float(loss), float(rate), float(norm)) for s, loss, rate, norm in values["points"]]
        evaluations = [(int(step), float(loss)) for step, loss in values["evaluations"]]
        lengths = [(int(s), {int(n): float(loss) for n, loss in of.items()}) for s, of in values.get("by_length", [])]
        return cls(int(values["every"]), points, evaluations, lengths, int(values["num_tokens"]))


def loss_picture(history: History, title: str) -> bytes:
    """PNG of training and evaluation loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [point[0] for point in history.points]
    losses = [point[1] for point in history.points]
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="training")
    axes.plot(steps, _smoothed(losses), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if history.evaluations:
        at, values = zip(*history.evaluations, strict=True)
        axes.plot(at, values, "o-", color="#c8501e", linewidth=1.5, markersize=5, label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smooth, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth


def model_card(config: TrainConfig, metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    """README.md of the adapter, with the front matter that the hub reads; ADAPTER_KEY stands for where it will lie."""
    spec, layout = config.spec, RunLayout.of(config.spec.output.uri, config.run)
    base = spec.model.uri.removeprefix("hf://")
    from_hub = f"base_model: {base}\n" if spec.model.uri.startswith("hf://") else ""  # the hub wants a repository here
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in metrics.items() if value is not None)
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return f"""---
{from_hub}library_name: peft
pipeline_tag: text-generation
tags: [lora, qlora]
---

# {config.run.name}

A LoRA adapter for `{base}`, trained with QLoRA on `{spec.dataset.uri}`.

![loss](loss.png)

| measure | value |
|---|---|
{rows}

## Use

{_usage(spec, layout.uri(ADAPTER_KEY))}

## How it was made

| | |
|---|---|
| quantization | {spec.quantization.type}, double quantization {"on" if spec.quantization.double_quant else "off"}, \
{spec.quantization.compute_dtype} |
| LoRA | r {spec.lora.r}, alpha {spec.lora.alpha:g}, dropout {spec.lora.dropout:g}, \
targets {", ".join(spec.lora.target_modules)} |
| training | {metrics["steps"]} steps of {spec.training.global_batch_size} sequences of at most \
{spec.training.max_length} tokens |
| optimizer | {spec.training.optimizer}, {spec.training.lr_scheduler}, peak {spec.training.learning_rate:g} |
| base digest | `{provenance["model_digest"]}` |
| data digest | `{provenance["dataset_digest"]}` |
| versions | {versions} |

`{layout.uri(MANIFEST)}`, two folders up, lists every file with its size and sha256.
"""


def _usage(spec: QLoRAFinetuneSpec, adapter_uri: str) -> str:
    """How to fetch adapter and base and load them: commands, then Python that runs beside what they fetched.

    The run converted a GGUF file by `gguf_file=` (sources.py); a user gets the same weights in the same way.
    """
    model = spec.model
    commands = [_fetch(adapter_uri, "adapter", spec.output.endpoint)]
    where, options = model.uri.removeprefix("hf://"), {"revision": model.revision}
    if not model.uri.startswith("hf://"):
        commands.append(_fetch(model.uri, "base", model.endpoint))
        where, options = "base", {"gguf_file": model.uri.rsplit("/", 1)[1] if _is_gguf(model.uri) else None}
    arguments = [json.dumps(where), *(f"{name}={json.dumps(value)}" for name, value in options.items() if value)]
    if model.trust_remote_code:
        arguments.append("trust_remote_code=True")
    call = f"from_pretrained({', '.join(arguments)})"
    hint = '\n\nIf the base is a GGUF file, add `gguf_file="NAME.gguf"` to the first two calls.'
    fetched = "\n".join(commands)
    return f"""```bash
{fetched}
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.{call}
base = AutoModelForCausalLM.{call}
model = PeftModel.from_pretrained(base, "adapter")
```{"" if _is_gguf(model.uri) else hint}"""


def _is_gguf(uri: str) -> bool:
    return uri.lower().endswith(".gguf")


def _fetch(uri: str, folder: str, endpoint: str | None) -> str:
    """A command that brings what lies at an s3://, pvc:// or file:// URI into the folder."""
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        what = quote(uri) if _is_gguf(uri) else f"--recursive {quote(uri.rstrip('/') + '/')}"
        return f"aws s3 cp {what} {folder}/" + (f" --endpoint-url {quote(endpoint)}" if endpoint else "")
    target = quote(f"{folder}/{Path(parts.path).name}" if _is_gguf(uri) else folder)
    if parts.scheme == "pvc":
        source = quote(f"POD:MOUNT_PATH/{parts.path.strip('/') or '.'}")
        return f"kubectl cp {source} {target}  # a POD with the volume claim {parts.netloc} at MOUNT_PATH"
    source = quote(unquote(parts.path) + ("" if _is_gguf(uri) else "/."))
    return f"mkdir -p {folder} && cp -r {source} {target}"
