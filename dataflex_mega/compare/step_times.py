"""The file that clock.Clock writes into a run's folder: {"step", "seconds"} a line. Here to be read without transformers."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "times.jsonl"


def read_last(folder: Path) -> int:
    """The last step that a run has finished, 0 when none. Reads the end of the file only."""
    path = folder / FILE
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4096))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.endswith("}")]
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].startswith("{") else 0
