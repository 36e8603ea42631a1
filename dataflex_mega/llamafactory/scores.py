"""A score of every raw row, which LLaMA-Factory's tokenized datasets no longer have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.errors import ConfigError, DataError, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs

WAY_OUT = "use score_params.score_path, a file with a number for each sample"


def raw_scores(args: LFArgs, name: str, column: str, samples: int) -> np.ndarray:
    """[samples] float64: the numbers under `column` in the rows of one dataset, in the order of its tokenized samples.

    Raises:
        ConfigError: the samples are not the rows: pre-training text in blocks, a held-out split, or a loader whose rows
            cannot be read again.
        DataError: no such column, a value that is no finite number (with its row), or rows that became no sample.
    """
    where = f"reorder.score_params.score_field {column!r}"
    if args.finetuning.stage == "pt" and args.data.packing:
        raise ConfigError(f"{where}: samples of stage pt are blocks of several rows; set packing: false, or {WAY_OUT}")
    if args.data.val_size > 1e-6:
        raise ConfigError(f"{where}: val_size takes rows out; name an eval_dataset instead, or {WAY_OUT}")
    rows = _rows(args, name, where)
    if column not in rows.column_names:
        has = f"it has {', '.join(rows.column_names)}"
        raise DataError(f"{where}: dataset {name!r} has no such column{did_you_mean(column, rows.column_names)}; {has}")
    scores = [_number(value, f"{where}: dataset {name!r} row {row}") for row, value in enumerate(rows[column])]
    if len(scores) != samples:
        raise DataError(
            f"{where}: dataset {name!r} has {len(scores)} rows, of which {samples} became samples; {WAY_OUT}"
        )
    return np.asarray(scores, np.float64)


def _rows(args: LFArgs, name: str, where: str) -> Any:
    """The rows as LLaMA-Factory reads them, before it brings them into its own columns."""
    from datasets import load_dataset
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.extras.constants import FILEEXT2TYPE

    entry = get_dataset_list([name], args.data.dataset_dir)[0]
    if entry.load_from not in ("file", "hf_hub") or entry.num_samples is not None:
        raise ConfigError(f"{where}: dataset {name!r} is a sample or from {entry.load_from}; {WAY_OUT}")
    common: dict[str, Any] = {"split": entry.split, "cache_dir": args.model.cache_dir}
    if entry.load_from == "hf_hub":
        token = args.model.hf_hub_token
        rows: Any = load_dataset(entry.dataset_name, name=entry.subset, data_dir=entry.folder, token=token, **common)
    else:
        path = Path(args.data.dataset_dir) / entry.dataset_name
        files = [path / file.name for file in path.iterdir()] if path.is_dir() else [path]
        rows = load_dataset(FILEEXT2TYPE[files[0].suffix[1:]], data_files=[str(file) for file in files], **common)
    if args.data.max_samples is not None:
        rows = rows.select(range(min(args.data.max_samples, len(rows))))
    return rows


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, found {value!r}")
    return float(value)
