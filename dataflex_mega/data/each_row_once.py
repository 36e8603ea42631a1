"""Proportions that hold until a domain is used up and leave no row out: `mix_strategy: interleave_once`.

While every domain has enough left, a step draws in the wanted proportions. The step in which a domain would run dry draws
exactly what is left of it, and the others share the rest of that step and all later ones in the ratio of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import DataError
from dataflex_mega.types import SamplingPlan


def without_repeats(
    sampler: Sampler, plan: SamplingPlan, wanted: Sequence[float], limits: Sequence[float]
) -> SamplingPlan:
    """The plan, beginning at its start, with proportions under which its first step draws no domain beyond its limit.

    Args:
        wanted: [k] proportions, all > 0.
        limits: [k] samples that may be drawn of each domain in the run.

    Raises DataError when less than a batch is left.
    """
    ideal, left = np.asarray(wanted, np.float64), np.asarray(limits, np.float64) - np.asarray(plan.cursors, np.float64)
    size = sampler.batch_size
    if left.sum() < size:
        raise DataError(f"step {plan.start_step + 1}: {int(left.sum())} rows are left for a batch of {size}")
    drained = left <= 0
    while True:
        candidate = _shared(plan, ideal, left, drained, size)
        over = (sampler.counts_at(candidate, plan.start_step) > left) & ~drained
        if not over.any():
            return candidate
        drained = drained | over


def _shared(plan: SamplingPlan, ideal: np.ndarray, left: np.ndarray, drained: np.ndarray, size: int) -> SamplingPlan:
    """All that is left of the drained domains, the rest of the batch from the others. What was owed to the drained ones is
    owed to the largest other one, so that their number is exact."""
    if drained.all():
        return replace(plan, proportions=tuple((left / left.sum()).tolist()), credits=(0.0,) * len(left))
    rest = size - left[drained].sum()
    shares = np.where(drained, left, rest * ideal / ideal[~drained].sum()) / size
    credits = np.asarray(plan.credits, np.float64)
    owed = credits[drained].sum()
    credits[drained] = 0.0
    credits[int(np.argmax(np.where(drained, -1.0, ideal)))] += owed
    return replace(plan, proportions=tuple((shares / shares.sum()).tolist()), credits=tuple(credits.tolist()))
