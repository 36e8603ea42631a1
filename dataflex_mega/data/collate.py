"""Samples -> Batch: shift labels, pad rows to one length, or pack several samples into a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dataflex_mega.data.pool import Sample
from dataflex_mega.types import IGNORE_INDEX, Batch

PAD_TO_MULTIPLE = 8  # the granularity of matrix units


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sample lengths -> rows of sample indices whose lengths sum to at most `capacity`.

    A longer sample gets a row of its own. Ties keep their order, so the same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return [sorted(row) for row in rows]


def collate(samples: Sequence[Sample], pad_id: int, pack_length: int | None = None) -> Batch:
    """n samples -> one micro-batch.

    Without `pack_length` every sample is a row. With it, samples share rows of up to that many positions; `segment_ids`
    separates them, and a sample's last position has no target, so nothing is predicted across a border.
    """
    if pack_length is None:
        rows = [[index] for index in range(len(samples))]
    else:
        rows = first_fit_decreasing([len(s.input_ids) for s in samples], pack_length)
    width = max(sum(len(samples[i].input_ids) for i in row) for row in rows)
    width = -(-width // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)
    segment_ids = np.full((len(rows), width), -1, dtype=np.int64)
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    reference_losses = _reference_loss_buffer(samples, (len(rows), width))
    for r, row in enumerate(rows):
        start = 0
        for index in row:
            length = len(samples[index].input_ids)
            span = slice(start, start + length)
            input_ids[r, span] = samples[index].input_ids
            labels[r, start : start + length - 1] = samples[index].labels[1:]
            segment_ids[r, span] = index
            position_ids[r, span] = np.arange(length)
            if reference_losses is not None:
                reference_losses[r, span] = samples[index].reference_losses
            start += length
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        sample_ids=torch.tensor([s.sample_id for s in samples], dtype=torch.int64),
        domain_ids=torch.tensor([s.domain_id for s in samples], dtype=torch.int64),
        is_packed=len(rows) < len(samples),
        reference_losses=None if reference_losses is None else torch.from_numpy(reference_losses),
    )


def _reference_loss_buffer(samples: Sequence[Sample], shape: tuple[int, int]) -> np.ndarray | None:
    """Zeros for the samples' reference losses; None when no sample has them. Raises ValueError when only some have."""
    count = sum(sample.reference_losses is not None for sample in samples)
    if count not in (0, len(samples)):
        raise ValueError(f"{count} of {len(samples)} samples have reference losses")
    return np.zeros(shape, dtype=np.float32) if count else None
