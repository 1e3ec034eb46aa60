"""What the documents and examples write fits the types: fields, reasons, metrics and files that they name exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.names import KIND, Reason
from qlora_api.run import METRIC_STEP_WORK
from qlora_api.types import QLoRAFinetuneSpec

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", ROOT / "examples/data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def finetunes(text: str) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(text) if item and item["kind"] == KIND]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_fits_the_types(path: Path) -> None:
    for item in finetunes(path.read_text()):
        QLoRAFinetuneSpec.model_validate(item["spec"])


def test_the_readmes_finetune_fits_the_types() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (item,) = finetunes(block)
    QLoRAFinetuneSpec.model_validate(item["spec"])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_links_to_what_is_there(path: Path) -> None:
    missing = [
        link for link in LINK.findall(path.read_text()) if "://" not in link and not (path.parent / link).exists()
    ]
    assert missing == []


def test_every_figure_of_the_readmes_table_is_among_the_results() -> None:
    table = (ROOT / "README.md").read_text().partition("| measured,")[2].partition("\n\n")[0]
    rows = [row.split("|")[2:4] for row in table.splitlines()[2:]]
    figures = {figure for row in rows for figure in re.findall(r"(?<!FSDP)\b\d[\d.,]*\b", " ".join(row))}
    results = set(re.findall(r"\b\d[\d.,]*\b", (ROOT / "benchmarks/results.md").read_text()))
    assert len(figures) > 10 and figures <= results


def test_the_table_of_bad_input_names_reasons_that_exist() -> None:
    table = (ROOT / "docs/bad-input.md").read_text().partition("## Conditions")[2]
    named = {row.split("|")[2].split("`")[1] for row in table.splitlines() if row.startswith("|") and "`" in row}
    assert named and named <= {str(reason) for reason in Reason}


def test_every_measure_of_a_worker_is_documented() -> None:
    folder = ROOT / "trainer-image/src/qlora_trainer"
    worker = "".join((folder / f"{name}.py").read_text() for name in ("progress", "measures", "workclock", "report"))
    named = worker.replace("METRIC_STEP_WORK", f'"{METRIC_STEP_WORK}"').replace("{longest}", "N")
    measured = set(re.findall(r'"(mfu|\w+_(?:seconds|bytes|share|failures|per_second|N_tokens))"', named))
    for path in folder.glob("*.py"):
        measured |= set(re.findall(r'set_metric\("(\w+)"', path.read_text()))
    measured -= {"tokens_per_second", "eta_seconds"}  # of Progress
    table = (ROOT / "docs/metrics.md").read_text().partition("# What the operator exports")[0]
    assert measured and measured == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
