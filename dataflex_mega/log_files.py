"""Log files of one JSON object a line: cut back to the step of a checkpoint, whatever a power failure made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dataflex_mega.files import atomic_write, fsync_file, rename_durably
from dataflex_mega.log import get_logger

BROKEN = (ValueError, RecursionError)  # of json.loads: bad bytes, bad JSON, too deeply nested
STEP_KEYS = {"step", "current_steps"}  # every line of a log has one of them; other lines are of a user's own file


def truncate_log(path: Path, step: int, key: str = "step") -> None:
    """Drop the lines of a JSON-lines file whose `key` is beyond `step`, and an incomplete last line: they will be written
    again. Does nothing without the file, or with one of other lines than ours under its name.

    Lines that cannot be read are dropped too; then the file as it was stays beside it as NAME.damaged, NAME.damaged-2, ...,
    and a note says how many. A folder of that name is moved there as a whole.
    """
    if not os.path.lexists(path):
        return
    if not path.is_file():
        aside = move_aside(path)
        get_logger().info(f"note: {path} is not a file; it is now {aside.name}")
        return
    if not is_own_log(path):
        return
    data = path.read_bytes()
    *lines, last = data.split(b"\n")
    rows = [(line, parse_line(line)) for line in lines if line]
    kept = [line.strip(b"\0") + b"\n" for line, row in rows if row is not None and _step(row, key) <= step]
    damaged = sum(row is None or _step(row, key) == float("inf") for _, row in rows)
    complete = parse_line(
        last
    )  # a whole line without its end is written again like an incomplete one, unless it is old
    if complete is not None and _step(complete, key) <= step:
        kept.append(last.strip(b"\0") + b"\n")
    if damaged:
        aside = move_aside(path, copy=True)
        get_logger().info(f"note: {path}: {damaged} damaged lines dropped; the file as it was is {aside.name}")
    if b"".join(kept) != data:
        atomic_write(path, b"".join(kept))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object of a line, without the zero bytes that a power failure puts around it; None for anything else."""
    try:
        row = json.loads(line.strip(b"\0").decode())
    except BROKEN:
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a log; none without the file."""
    if not path.is_file():
        return []
    return [row for line in path.read_bytes().split(b"\n") if line and (row := parse_line(line)) is not None]


def is_own_log(path: Path) -> bool:
    """Whether the lines of a file are those that this program writes under its name, as far as any can be read."""
    rows = read_rows(path)
    return not rows or any(STEP_KEYS & row.keys() for row in rows)


def flush_logs(folder: Path) -> None:
    """Flush the logs in a folder to the disk, so that they reach at least as far as a checkpoint that is written next."""
    for path in folder.glob("*.jsonl"):
        if path.is_file():
            fsync_file(path)


def _step(row: dict[str, Any], key: str) -> float:
    """The step of a row, infinite when it is no number; a row without one is before all steps."""
    value = row.get(key, -float("inf"))
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else float("inf")


def move_aside(path: Path, copy: bool = False) -> Path:
    """Give a file another name beside it, one that is free; with `copy` it keeps its own too, until it is replaced."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    if copy:
        atomic_write(aside, path.read_bytes())
    else:
        rename_durably(path, aside)
    return aside
