"""Micro-batches of one shape: the tensors that pipeline stages exchange always have the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dataflex_mega.types import IGNORE_INDEX, Batch


def pad_to_shape(batches: Sequence[Batch], rows: int, width: int) -> list[Batch]:
    """The batches with `rows` rows of `width` positions; the padding carries no loss."""
    return [_pad_batch(batch, rows, width) for batch in batches]


def _pad_batch(batch: Batch, rows: int, width: int) -> Batch:
    b, s = batch.input_ids.shape
    if (b, s) == (rows, width):
        return batch
    space = (0, width - s, 0, rows - b)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, space),
        labels=pad(batch.labels, space, value=IGNORE_INDEX),
        segment_ids=pad(batch.segment_ids, space, value=-1),
        position_ids=pad(batch.position_ids, space),
        reference_losses=None if batch.reference_losses is None else pad(batch.reference_losses, space),
    )


def split_rows(batch: Batch, rows: int, multiple: int) -> list[Batch]:
    """A batch as several of `rows` rows, a multiple of `multiple` of them, the last ones padding where need be.

    Only the [b, S] fields are split; every micro-batch has all fields of samples.
    """
    count = -(-len(batch.input_ids) // rows)
    count = -(-count // multiple) * multiple
    padded = _pad_batch(batch, count * rows, batch.input_ids.shape[1])
    grids = ("input_ids", "labels", "segment_ids", "position_ids", "reference_losses")
    splits = {name: value.split(rows) for name, value in padded.tensors().items() if name in grids}
    return [replace(padded, **{name: values[i] for name, values in splits.items()}) for i in range(count)]


def blocked_mask(segment_ids: Tensor, rows: Tensor | None = None) -> Tensor:
    """[b, S] -> [b, 1, S, S], true where attention is blocked: to later positions and to other samples.

    `rows`: [s] positions whose rows alone are returned, [b, 1, s, S]. Padding attends to padding, because a row of a softmax
    that is blocked everywhere is not a number.
    """
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    rows = positions if rows is None else rows
    same = segment_ids[:, rows].unsqueeze(2) == segment_ids.unsqueeze(1)
    causal = rows.unsqueeze(1) >= positions
    return (same & causal).logical_not().unsqueeze(1)
