"""Gram matrices of domain gradients, each gradient taken on a probe: a few samples of its domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_shares
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.types import Batch


@dataclass
class DomainGradientGram:
    """Draws the probes and divides them over ranks; the draw does not depend on the number of ranks."""

    pool: SamplePool
    targets: Sequence[SamplePool]  # evaluation sets, together one more domain; may be empty
    collate: Callable[[Sequence[Sample]], Batch]
    gradient_gram: Callable[[list[list[Batch]]], Tensor]  # Engine.gradient_gram
    batch_size: int
    dp_rank: int
    dp_size: int
    seed: int

    def __call__(self, count: int, against_targets: bool, step: int) -> Tensor:
        """[m, m] float64 on the CPU, equal on all ranks; m is the number of domains, one more with targets.

        Args:
            count: samples per probe; a domain that has fewer gives all.
            against_targets: whether the targets are the last domain.
            step: another step draws other samples.
        """
        groups, first = [], 0
        for size in self.pool.sizes:
            groups.append(self._batches(self.pool, first + self._rows(size, count, step)))
            first += size
        if against_targets:
            groups.append(self._target_batches(count, step))
        return self.gradient_gram(groups)

    def _rows(self, size: int, count: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, step, size])
        return np.sort(rng.choice(size, size=min(count, size), replace=False))

    def _target_batches(self, count: int, step: int) -> list[Batch]:
        """Of about `count` samples, equally many from each evaluation set."""
        per_set = -(-count // len(self.targets))
        return [batch for pool in self.targets for batch in self._batches(pool, self._rows(len(pool), per_set, step))]

    def _batches(self, pool: SamplePool, ids: np.ndarray) -> list[Batch]:
        return lockstep_shares(pool, ids, self.collate, self.batch_size, self.dp_rank, self.dp_size)


def gram_matrix(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """m gradients, each a list of equally shaped tensors -> [m, m] float64 inner products of this rank's tensors."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, gradient in enumerate(gradients):
        for j in range(i + 1):
            value = sum(float((a.double() * b.double()).sum()) for a, b in zip(gradient, gradients[j], strict=True))
            gram[i, j] = gram[j, i] = value
    return gram
