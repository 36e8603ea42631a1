"""Rows of a Hugging Face dataset or a list as (input_ids, labels), tokenized where they are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataflex_mega.errors import DataError
from dataflex_mega.types import IGNORE_INDEX

INPUT_IDS, LABELS, TEXT = "input_ids", "labels", "text"


def tokenize_rows(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    text: str = TEXT,
    max_length: int | None = None,
    prompt: str | None = None,
) -> list[dict[str, np.ndarray]]:
    """Rows with a text -> rows with input_ids and labels, int64; see api.tokenize.

    Raises DataError naming a row without the column, or without a token.
    """
    rows = []
    for number, row in enumerate(dataset):
        missing = [column for column in (text, prompt) if column is not None and column not in row]
        if missing:
            raise DataError(f"row {number}: no column {missing[0]!r}; there is {', '.join(map(str, row))}")
        head = list(tokenizer(str(row[prompt])).input_ids) if prompt is not None else []
        tail = list(tokenizer(str(row[text]), add_special_tokens=prompt is None).input_ids)
        if prompt is not None and tokenizer.eos_token_id is not None:
            tail.append(tokenizer.eos_token_id)
        ids = np.asarray([*head, *tail][:max_length], dtype=np.int64)
        if not len(ids):
            raise DataError(f"row {number}: no token in column {text!r}")
        labels = ids.copy()
        labels[: len(head)] = IGNORE_INDEX
        rows.append({INPUT_IDS: ids, LABELS: labels})
    return rows


@dataclass(frozen=True)
class TokenizedRows:
    """A data.pool.RowSource over rows with input_ids and optionally labels."""

    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def from_dataset(cls, dataset: Sequence[Any], tokenizer: Any, max_length: int | None = None) -> TokenizedRows:
        """Rows that have a text and no input_ids, and texts themselves, are tokenized. Raises DataError for an empty
        dataset."""
        if not len(dataset):
            raise DataError("a dataset has no rows")
        if isinstance(dataset[0], str):
            dataset = [{TEXT: text} for text in dataset]
        return cls(dataset if INPUT_IDS in dataset[0] else tokenize_rows(dataset, tokenizer, TEXT, max_length))

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n pairs (input_ids, labels) of int64 arrays of one length, labels not yet shifted."""
        return [self._row(int(row)) for row in rows]

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        row = self.rows[number]
        ids = np.asarray(row[INPUT_IDS], dtype=np.int64)
        labels = ids if row.get(LABELS) is None else np.asarray(row[LABELS], dtype=np.int64)
        if len(ids) != len(labels) or not len(ids):
            raise DataError(
                f"row {number}: {len(ids)} input_ids and {len(labels)} labels; expected equally many, not 0"
            )
        return ids, labels
