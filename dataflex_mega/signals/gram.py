"""Inner products of the gradients of domains, each taken on a probe of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.types import IGNORED, Batch


@dataclass
class DomainGram:
    """Draws the probes and shares them out over ranks; what they are does not depend on how many ranks there are."""

    pool: Pool
    targets: Sequence[Pool]  # evaluation sets, which are one more domain together; none to leave that out
    collate: Callable[[Sequence[Sample]], Batch]
    gram: Callable[[list[list[Batch]]], Tensor]  # Engine.gradient_gram
    batch_size: int
    rank: int
    ranks: int
    seed: int

    def __call__(self, count: int, against_targets: bool, step: int) -> Tensor:
        """[m, m] float64 on the CPU, equal on all ranks; m is the number of domains, one more with targets.

        Args:
            count: samples of each probe; all of a domain that has fewer.
            step: another step draws other samples.
        """
        groups, first = [], 0
        for size in self.pool.sizes:
            groups.append(self._batches(self.pool, first + self._rows(size, count, step)))
            first += size
        if against_targets:
            groups.append(self._of_targets(count, step))
        return self.gram(groups)

    def _rows(self, size: int, count: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, step, size])
        return np.sort(rng.choice(size, size=min(count, size), replace=False))

    def _of_targets(self, count: int, step: int) -> list[Batch]:
        """Evenly from all evaluation sets."""
        share = -(-count // len(self.targets))
        parts = [self._batches(pool, self._rows(len(pool), share, step)) for pool in self.targets]
        return [batch for part in parts for batch in part]

    def _batches(self, pool: Pool, ids: np.ndarray) -> list[Batch]:
        """This rank's share, in equally many batches on every rank; fillers have no target token."""
        per_rank = -(-len(ids) // self.ranks)
        mine, made = ids[self.rank * per_rank : (self.rank + 1) * per_rank], []
        for start in range(0, per_rank, self.batch_size):
            here = mine[start : start + self.batch_size]
            samples = pool.fetch(here if len(here) else ids[:1])
            if not len(here):
                samples = [replace(s, labels=np.full_like(s.labels, IGNORED)) for s in samples]
            made.append(self.collate(samples))
        return made


def products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """m gradients, each a list of the same tensors -> [m, m] float64 inner products of what is here."""
    found = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, one in enumerate(gradients):
        for j in range(i + 1):
            value = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, gradients[j], strict=True))
            found[i, j] = found[j, i] = value
    return found
