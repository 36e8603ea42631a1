"""`train_type: static` is LLaMA-Factory's own training, every stage of it."""

from __future__ import annotations

from typing import Any

from dataflex_mega.lf.callbacks import load_callbacks
from dataflex_mega.lf.compat import ensure_importable
from dataflex_mega.lf.data import check_names


def run_static(lf: dict[str, Any], callbacks: list[str], datasets: list[str]) -> None:
    """Run LLaMA-Factory's `run_exp` on exactly these keys. `callbacks` are `package.module:Class` names.

    Raises DataError for one of `datasets` that is unknown or missing, before anything is loaded.
    """
    ensure_importable()
    from llamafactory.train.tuner import run_exp

    for name in datasets:
        check_names([name], lf.get("dataset_dir", "data"))
    run_exp(dict(lf), load_callbacks(callbacks))
