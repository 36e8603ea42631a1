"""The files in which scripts look for the figures of a run, as Hugging Face's Trainer writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dataflex_mega.checkpoint_format import UNREADABLE
from dataflex_mega.files import atomic_write
from dataflex_mega.trainer import Trainer

ALL = "all_results.json"


def evaluation_of_model(trainer: Trainer, wanted: bool) -> dict[str, float]:
    """The evaluation of the model that is exported; nothing unless it is `wanted` and there are evaluation sets.

    It is the one that the loop has made at that step, or is made now. Every rank calls this.
    """
    if not wanted or trainer.evaluate is None:
        return {}
    found = trainer.hooks.evaluations.get(trainer.model_step)
    return trainer.evaluate() if found is None else found


def write_metrics(folder: Path, split: str, metrics: dict[str, float]) -> None:
    """SPLIT_results.json, and the same figures among those of the other splits in all_results.json."""
    _write(folder / f"{split}_results.json", metrics)
    _write(folder / ALL, {**_read(folder / ALL), **metrics})


def _write(path: Path, metrics: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(metrics, indent=4, sort_keys=True))


def _read(path: Path) -> dict[str, Any]:
    """What an earlier part of the run, or an earlier run, has written; nothing when it cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except UNREADABLE:
        return {}
    return content if isinstance(content, dict) else {}
