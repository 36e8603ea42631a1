"""Values of single samples from the logits of their own positions; what both engines share of `Engine.per_sample`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dataflex_mega.types import Batch

PerSampleFn = Callable[[Tensor, Tensor], Tensor]
"""[s, V] logits of one sample's s positions, [s] shifted labels (IGNORE_INDEX without a target) -> a scalar or [m]."""


def per_sample_values(
    logits: Tensor, batch: Batch, fn: PerSampleFn, gather_vocabulary: Callable[[Tensor], Tensor] = lambda part: part
) -> dict[int, Tensor]:
    """`fn` of each sample that has positions in the batch, by its index in the batch, as float32 [m].

    Args:
        logits: [b, S, V], or a shard of the vocabulary.
        gather_vocabulary: [s, V / ranks] -> [s, V]; called for the positions of one sample after the other.
    """
    values = {}
    for index in range(len(batch.sample_ids)):
        rows, positions = torch.where(batch.segment_ids == index)
        if len(rows) == 0:
            continue
        of_sample = gather_vocabulary(logits[rows, positions])
        of_sample = of_sample if of_sample.dtype == torch.float64 else of_sample.float()
        values[index] = fn(of_sample, batch.labels[rows, positions]).reshape(-1).float()
    return values


def stack_values(values: dict[int, Tensor], num_samples: int, width: int, device: torch.device) -> Tensor:
    """[num_samples, width] float32 of what `per_sample_values` returned; zeros for samples without positions."""
    zeros = torch.zeros(width, device=device)
    return torch.stack([values.get(index, zeros) for index in range(num_samples)])


def width_of(values: dict[int, Tensor]) -> int:
    """The number of values per sample; 0 when there are none."""
    return next((len(value) for value in values.values()), 0)
