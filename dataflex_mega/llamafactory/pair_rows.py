"""Rows of LLaMA-Factory's ranking datasets: a chosen and a rejected answer to one prompt, as one sample."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dataflex_mega.data.pairs import join_pair
from dataflex_mega.types import IGNORE_INDEX

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
ROWS_PER_COUNT = 4096  # while target tokens are counted


class PairRows:
    """A data.pool.RowSource over the columns that LLaMA-Factory's processor of pairs writes; see data.pairs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.select_columns(list(COLUMNS)).with_format("arrow")

    @staticmethod
    def fits(dataset: Any) -> bool:
        """Whether a tokenized dataset holds pairs."""
        return COLUMNS[0] in dataset.column_names

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n samples (input_ids, labels) as `join_pair` makes them."""
        table = self._dataset[rows.tolist()]
        columns = [_arrays(table[column]) for column in COLUMNS]
        return [join_pair((a, b), (c, d)) for a, b, c, d in zip(*columns, strict=True)]

    def target_counts(self) -> np.ndarray:
        """[n] int64: target tokens of both answers, 0 where one of them has none; see data.targets."""
        counts = [np.zeros(0, dtype=np.int64)]
        for first in range(0, len(self), ROWS_PER_COUNT):
            table = self._dataset[first : min(first + ROWS_PER_COUNT, len(self))]
            chosen, rejected = (_num_targets(_arrays(table[column])) for column in (COLUMNS[1], COLUMNS[3]))
            counts.append(np.where((chosen > 0) & (rejected > 0), chosen + rejected, 0))
        return np.concatenate(counts)


def _num_targets(labels: list[np.ndarray]) -> np.ndarray:
    """[n] int64. The first token of a row has nothing before it and is no target."""
    return np.asarray([int((one[1:] != IGNORE_INDEX).sum()) for one in labels], dtype=np.int64)


def _arrays(column: Any) -> list[np.ndarray]:
    """A column of lists in Arrow's memory -> int64 arrays of their own."""
    arrays = []
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        arrays += [values[a:b].astype(np.int64) for a, b in itertools.pairwise(ends)]
    return arrays
