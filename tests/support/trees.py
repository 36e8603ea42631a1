"""What lies in a folder, to see that a run has changed nothing there, and damage to it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def contents(folder, *names):
    """Relative path -> SHA-256 of every file below a folder, or below these entries of it; None for a folder."""
    tops = [Path(folder) / name for name in names] or [Path(folder)]
    paths = [path for top in tops for path in [top, *top.rglob("*")]]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in paths
    }


def flip(path):
    """Change one bit of a file, in its middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def checkpoints(folder):
    """The names of the checkpoints in a folder, by step."""
    found = Path(folder).glob("checkpoint-*")
    return [path.name for path in sorted(found, key=lambda path: int(path.name.split("-")[1]))]


def as_trainer(checkpoint):
    """Make a folder look like a checkpoint of Hugging Face's trainer."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"):
        (checkpoint / name).write_text(f"{checkpoint.name} {name}")
