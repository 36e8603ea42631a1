"""The file of step_timer.StepTimer, one {"step", "seconds"} per line; a module of its own, without transformers."""

from __future__ import annotations

from pathlib import Path

from dataflex_mega.log_files import parse_line

STEP_TIMES_FILE = "times.jsonl"


def read_last_step(folder: Path) -> int:
    """The last finished step of a run, 0 when there is none. Reads only the end of the file."""
    path = folder / STEP_TIMES_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        rows = [row for line in stream.read().split(b"\n") if (row := parse_line(line)) is not None]
    return int(rows[-1].get("step", 0)) if rows else 0
