"""How many target tokens the rows of a dataset have. What has none trains nothing and has no loss to report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from dataflex_mega.data.pool import RowSource
from dataflex_mega.errors import DataError
from dataflex_mega.types import IGNORE_INDEX

ROWS_PER_READ = 4096


@runtime_checkable
class CountsTargets(Protocol):
    """Rows that know their numbers of targets without being fetched one by one."""

    def target_counts(self) -> np.ndarray:
        """[n] int64: target tokens of each row. The first token of a row has nothing before it and is no target."""
        ...


@dataclass(frozen=True)
class TargetCount:
    """Rows of a dataset and their target tokens."""

    rows: int
    without: int  # rows that have no target
    tokens: int  # target tokens of all rows


def count_targets(rows: RowSource) -> TargetCount:
    """Count the targets of all rows; every token is looked at once."""
    if isinstance(rows, CountsTargets):
        counts = rows.target_counts()
    else:
        parts = []
        for first in range(0, len(rows), ROWS_PER_READ):
            fetched = rows.fetch(np.arange(first, min(first + ROWS_PER_READ, len(rows))))
            parts += [int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in fetched]
        counts = np.asarray(parts, dtype=np.int64)
    return TargetCount(len(counts), int((counts == 0).sum()), int(counts.sum()))


def check_targets(kind: str, counts: Mapping[str, TargetCount], cutoff_len: int) -> list[str]:
    """Lines about datasets of which some rows have no target. Raises DataError for one of which none has.

    Args:
        kind: the key that names them, `dataset` or `eval_dataset`.
        counts: by name; "" is what val_size holds out.
    """
    notes = []
    for name, count in counts.items():
        what = f"{kind} {name!r}" if name else "val_size: the evaluation set"
        reason = f"after cutoff_len {cutoff_len}"
        if count.without == count.rows:
            raise DataError(
                f"{what}: none of its {count.rows:,} rows has a target token {reason}: what comes before the answers fills "
                "the rows, or there are no answers; raise cutoff_len or shorten the prompts"
            )
        if count.without:
            effect = "train nothing" if kind == "dataset" else "are not measured"
            notes.append(f"{what}: {count.without:,} of {count.rows:,} rows have no target token {reason} and {effect}")
    return notes


def summary(counts: Mapping[str, TargetCount]) -> list[str]:
    """One line for each training dataset."""
    return [f"dataset {name!r}: {count.rows:,} rows, {count.tokens:,} target tokens" for name, count in counts.items()]
