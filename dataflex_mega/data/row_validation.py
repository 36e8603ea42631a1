"""Find the row that makes a local data file unreadable, so that the error can name it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def first_bad_row(path: Path, column: str | None) -> str | None:
    """One line that names the file and the first row that is broken, lacks `column`, or None if all rows are sound.

    Reads .json (an array) and .jsonl, and folders of them; other formats are skipped.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in (".json", ".jsonl"):
            continue
        if file.stat().st_size == 0:
            return f"{file} is empty"
        problem = _first_bad_element(file, column) if _is_array(file) else _first_bad_line(file, column)
        if problem:
            return problem
    return None


def _is_array(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return next((c for c in iter(lambda: stream.read(1), "") if not c.isspace()), "") == "["


def _first_bad_line(file: Path, column: str | None) -> str | None:
    number = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                return f"{file}, line {number}: not JSON: {error}"
            problem = _row_problem(row, column)
            if problem:
                return f"{file}, line {number}: {problem}"
    return f"{file} has no rows" if number == 0 else None


def _first_bad_element(file: Path, column: str | None) -> str | None:
    try:
        rows = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{file}: not JSON: {error}"
    if not rows:
        return f"{file} has no rows"
    for number, row in enumerate(rows):
        problem = _row_problem(row, column)
        if problem:
            return f"{file}, row {number}: {problem}"
    return None


def _row_problem(row: Any, column: str | None) -> str | None:
    if not isinstance(row, dict):
        return f"a row must be an object, found {type(row).__name__}"
    if column and column not in row:
        return f"no {column!r} in the row; it has {', '.join(map(repr, row)) or 'nothing'}"
    return None
