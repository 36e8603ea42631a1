"""Values of single samples from the logits of their own positions; what both engines share of `Engine.per_sample`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dataflex_mega.errors import TrainingFault, UserCall
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
        values[index] = _checked(fn, of_sample, batch.labels[rows, positions])
    widths = {len(value) for value in values.values()}
    if len(widths) > 1:
        raise TrainingFault(f"{_name_of(fn)} returned {sorted(widths)} numbers for samples; equally many were expected")
    return values


def _checked(fn: PerSampleFn, logits: Tensor, labels: Tensor) -> Tensor:
    """[m] float32. Raises TrainingFault when the function raises or returns something else than a tensor."""
    with UserCall(_name_of(fn)):
        value = fn(logits, labels)
    if not isinstance(value, Tensor) or value.is_complex():
        raise TrainingFault(f"{_name_of(fn)} returned a {type(value).__name__}, a scalar or [m] tensor was expected")
    return value.reshape(-1).float()


def _name_of(fn: PerSampleFn) -> str:
    return f"per_sample function {getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', type(fn).__name__)}"


def stack_values(values: dict[int, Tensor], num_samples: int, width: int, device: torch.device) -> Tensor:
    """[num_samples, width] float32 of what `per_sample_values` returned; zeros for samples without positions."""
    zeros = torch.zeros(width, device=device)
    return torch.stack([values.get(index, zeros) for index in range(num_samples)])


def width_of(values: dict[int, Tensor]) -> int:
    """The number of values per sample; 0 when there are none."""
    return next((len(value) for value in values.values()), 0)


def nonzero_targets(count: Tensor) -> Tensor:
    """How many target samples of a group have a gradient, as a divisor. Raises TrainingFault for none: there is nothing that
    candidates could be compared with."""
    if not int(count):
        raise TrainingFault("eval_dataset: no sample of a group of targets has a gradient to compare with")
    return count
