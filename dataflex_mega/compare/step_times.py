"""The file of step_timer.StepTimer, one {"step", "seconds"} per line; a module of its own, without transformers."""

from __future__ import annotations

import json
from pathlib import Path

STEP_TIMES_FILE = "times.jsonl"


def read_last_step(folder: Path) -> int:
    """The last finished step of a run, 0 when there is none. Reads only the end of the file."""
    path = folder / STEP_TIMES_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].startswith("{") else 0
