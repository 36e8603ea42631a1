"""The rows in the order of the files, domain after domain: `disable_shuffling: true`.

A step draws the next G rows of the concatenation of all domains, and after the last row comes the first again.
"""

from __future__ import annotations

import numpy as np

from dataflex_mega.data.sampler import Sampler
from dataflex_mega.types import SamplingPlan


class NaturalOrder(Sampler):
    """A Sampler that shuffles nothing. Its plans say nothing of proportions: those follow from the rows."""

    def global_batch(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[G] int64 global ids of a step, as they follow each other."""
        return self._draws(plan, step, step + 1) % self.offsets[-1]

    def counts_at(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in this step."""
        return self._count(plan, step, step + 1)

    def counts_before(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in the steps plan.start_step .. step - 1."""
        return self._count(plan, plan.start_step, step)

    def _draws(self, plan: SamplingPlan, first: int, end: int) -> np.ndarray:
        """Which draws of the run the steps first .. end - 1 make."""
        if first < plan.start_step:
            raise ValueError(f"step {first} is before the plan's start {plan.start_step}")
        begin = sum(plan.cursors) - plan.start_step * self.batch_size
        return np.arange(begin + first * self.batch_size, begin + end * self.batch_size)

    def _count(self, plan: SamplingPlan, first: int, end: int) -> np.ndarray:
        rows = self._draws(plan, first, end) % self.offsets[-1]
        domain_ids = np.searchsorted(self.offsets, rows, side="right") - 1
        return np.bincount(domain_ids, minlength=len(self.sizes))
