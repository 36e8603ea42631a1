"""Pairs of a chosen and a rejected answer as samples of a pool, and their batches.

A pair is one sample: the tokens of the prompt with the chosen answer, then those of the prompt with the rejected one. The
label of a row's first token is never a target, so that of the second row's marks where it begins (BORDER). In a batch of n
pairs row r is the chosen answer of pair r and row n + r the rejected one, in LLaMA-Factory's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Sample
from dataflex_mega.errors import DataError
from dataflex_mega.types import IGNORE_INDEX, Batch

BORDER = -101  # the label of the first token of the rejected row
NUM_ROWS = 2  # of a pair; also how many reference sums it has

Row = tuple[np.ndarray, np.ndarray]  # input_ids, labels


def join_pair(chosen: Row, rejected: Row) -> Row:
    """Two rows (input_ids, labels) -> one, int64. Raises DataError for a row without a token."""
    if not len(chosen[0]) or not len(rejected[0]):
        raise DataError("a pair has a row without a token")
    labels = np.concatenate([chosen[1], rejected[1]])
    labels[len(chosen[1])] = BORDER
    return np.concatenate([chosen[0], rejected[0]]), labels


def split_pair(input_ids: np.ndarray, labels: np.ndarray) -> tuple[Row, Row]:
    """What `join_pair` joined; the label of the rejected row's first token is IGNORE_INDEX."""
    border = int(np.flatnonzero(labels == BORDER)[0])
    rejected = labels[border:].copy()
    rejected[0] = IGNORE_INDEX
    return (input_ids[:border], labels[:border]), (input_ids[border:], rejected)


def answered_tokens(sample: Sample) -> np.ndarray:
    """[length] int64: the tokens of a sample; of a pair those of the chosen answer with its prompt."""
    borders = np.flatnonzero(sample.labels == BORDER)
    return sample.input_ids[: int(borders[0])] if len(borders) else sample.input_ids


def collate_pairs(samples: Sequence[Sample], pad_id: int, pack_length: int | None = None) -> Batch:
    """n pairs -> a micro-batch of 2n rows, padded on the right. `pack_length` is not used: a row is never shared."""
    pairs = [split_pair(sample.input_ids, sample.labels) for sample in samples]
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    batch = collate(
        [
            replace(sample, input_ids=ids, labels=labels, reference_losses=None)
            for sample, (ids, labels) in zip([*samples, *samples], rows, strict=True)
        ],
        pad_id,
    )
    n, segments = len(samples), batch.segment_ids
    return replace(
        batch,
        segment_ids=torch.where(segments >= 0, segments % n, segments),  # both rows of a pair are one sample
        sample_ids=batch.sample_ids[:n],
        domain_ids=batch.domain_ids[:n],
        row_references=_row_references(samples),
    )


def _row_references(samples: Sequence[Sample]) -> torch.Tensor | None:
    """[2n] float32 in the order of the rows; None without a reference model."""
    sums = [sample.reference_losses for sample in samples if sample.reference_losses is not None]
    if not sums:
        return None
    return torch.from_numpy(np.stack(sums).astype(np.float32)).T.reshape(-1)
