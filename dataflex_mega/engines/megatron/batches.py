"""Micro-batches of one shape: what a pipeline passes on has the same size every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from dataflex_mega.types import IGNORE_INDEX, Batch


def pad_to_shape(batches: Sequence[Batch], rows: int, width: int) -> list[Batch]:
    """The batches with `rows` rows of `width` positions; what is added is padding and carries no loss."""
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

    Only the [b, S] fields are cut; the fields of samples stay whole.
    """
    count = -(-len(batch.input_ids) // rows)
    count = -(-count // multiple) * multiple
    whole = _pad_batch(batch, count * rows, batch.input_ids.shape[1])
    grids = ("input_ids", "labels", "segment_ids", "position_ids", "reference_losses")
    parts = {name: value.split(rows) for name, value in whole.tensors().items() if name in grids}
    return [replace(whole, **{name: split[i] for name, split in parts.items()}) for i in range(count)]


def blocked_mask(segment: Tensor, rows: Tensor | None = None) -> Tensor:
    """[b, S] segments -> [b, 1, S, S], true where attention is closed: to later positions and to other samples.

    `rows`: [s] positions, of which alone the rows are made, [b, 1, s, S]. Padding attends to padding, because a row of a
    softmax that is closed everywhere is not a number.
    """
    places = torch.arange(segment.shape[1], device=segment.device)
    rows = places if rows is None else rows
    same = segment[:, rows].unsqueeze(2) == segment.unsqueeze(1)
    causal = rows.unsqueeze(1) >= places
    return (same & causal).logical_not().unsqueeze(1)
