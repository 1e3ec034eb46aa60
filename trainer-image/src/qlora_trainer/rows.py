"""Rows of JSON Lines, JSON, CSV and Parquet files, each with its place, so that an error names file and line."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_trainer.errors import BadData


@dataclass(frozen=True)
class Row:
    """One sample as it stands in a file."""

    where: str  # FILE:LINE, or FILE row N where a format has no lines
    values: dict[str, Any]


def read_rows(folder: Path, files: list[str]) -> Iterator[Row]:
    """All rows of all files, in order. Raises BadData with file and line."""
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    for name in files:
        reader = readers.get(Path(name).suffix.lower())
        if reader is None:
            raise BadData(f"{name}: unknown kind of file: use *.jsonl, *.parquet or *.csv")
        try:
            yield from reader(folder / name, name)
        except UnicodeDecodeError as error:
            raise BadData(f"{name}: not UTF-8 at byte {error.start}: save the file as UTF-8") from error


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield Row(f"{name}:{number}", _object(line, name, number))


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line.rstrip())  # without its end: json would count that as a line of its own
    except json.JSONDecodeError as error:
        raise BadData(f"{name}:{number}: not JSON ({_what(error)}): write one object a line") from None
    if not isinstance(values, dict):
        raise BadData(f"{name}:{number}: a {type(values).__name__} instead of an object: write one object a line")
    return values


def _what(error: json.JSONDecodeError) -> str:
    """What json found, and where; some of its messages end with an `at` of their own."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _json(path: Path, name: str) -> Iterator[Row]:
    """Either one array of objects or, as many call it, JSON Lines."""
    with path.open(encoding="utf-8") as stream:
        start = stream.read(4096).lstrip()
    if not start.startswith("["):
        yield from _json_lines(path, name)
        return
    try:
        array = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadData(f"{name}:{error.lineno}: not JSON ({_what(error)}): write one array of objects") from None
    for number, values in enumerate(array, 1):
        if not isinstance(values, dict):
            raise BadData(f"{name} row {number}: a {type(values).__name__} instead of an object")
        yield Row(f"{name} row {number}", values)


def _csv(path: Path, name: str) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise BadData(
                        f"{name}:{reader.line_num}: not as many cells as the header has columns: quote the cells"
                    )
                yield Row(f"{name}:{reader.line_num}", dict(values))
        except csv.Error as error:
            raise BadData(
                f"{name}:{reader.line_num}: not CSV ({error}): quote cells that hold commas or quotes"
            ) from None


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{name} row {number}", values)
    except pa.ArrowInvalid as error:
        raise BadData(f"{name}: not Parquet ({error}): write the file again") from None
