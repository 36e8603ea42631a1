"""A rank's contiguous share of a pool, or of some of its samples, in batches that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches, lockstep_shares
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.types import Batch, SampleStats


@dataclass(frozen=True)
class PoolShare:
    """The samples of a forward pass over a pool, divided over data-parallel ranks."""

    pool: SamplePool
    batch_size: int
    dp_rank: int
    dp_size: int
    progress: Callable[[int, int], None] | None = None  # (batches done, batches in all)
    ids: np.ndarray | None = None  # ascending; None: the whole pool

    def subset(self, ids: np.ndarray) -> PoolShare:
        """The share of these samples alone, [N] ids in ascending order."""
        return replace(self, ids=ids)

    def rank_counts(self) -> list[int]:
        """Samples of each rank: whole batches, the remainder to the first ranks."""
        total = len(self.pool) if self.ids is None else len(self.ids)
        return rank_counts(total, self.batch_size, self.dp_size)

    def first_position(self) -> int:
        """Where this rank's share begins among all samples."""
        return sum(self.rank_counts()[: self.dp_rank])

    def local_ids(self) -> np.ndarray:
        """[n] global ids of this rank's samples, ascending."""
        first = self.first_position()
        positions = np.arange(first, first + self.rank_counts()[self.dp_rank], dtype=np.int64)
        return positions if self.ids is None else self.ids[positions]

    def num_batches(self) -> int:
        """Batches of the rank that has the most samples."""
        return -(-max(self.rank_counts()) // self.batch_size)

    def batches(self) -> Iterator[tuple[list[Sample], int]]:
        """Pairs (samples of a batch of this rank, how many of them count); equally many pairs on every rank, see
        data.lockstep. The caller drops results beyond `local_ids`."""
        total = self.num_batches()
        for number, (batch_ids, count) in enumerate(lockstep_batches(self.local_ids(), self.batch_size, total), 1):
            yield self.pool.fetch(batch_ids), count
            if self.progress is not None:
                self.progress(number, total)


def rank_counts(total: int, batch_size: int, dp_size: int) -> list[int]:
    """How many of `total` samples each rank has: whole batches, the remainder to the first ranks."""
    num_batches = -(-total // batch_size)
    ends = [num_batches * (rank + 1) // dp_size * batch_size for rank in range(dp_size)]
    ends[-1] = total
    ends = [min(end, total) for end in ends]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def target_batches(
    groups: Sequence[SamplePool], collate: Callable[[Sequence[Sample]], Batch], size: int, dp_rank: int, dp_size: int
) -> list[list[Batch]]:
    """A rank's share of each group, in equally many batches on every rank; fillers have no target token."""
    return [lockstep_shares(group, np.arange(len(group)), collate, size, dp_rank, dp_size) for group in groups]


def evaluate(
    share: PoolShare,
    collate: Callable[[Sequence[Sample]], Batch],
    loss_fn: Callable[[Batch], SampleStats],
    report: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([k] float64 loss sums, [k] float64 target tokens) of this rank's share, by domain.

    `report`: [m] float64, to which SampleStats.report of the samples that count is added, where they have one.
    """
    loss_sum, num_tokens = (torch.zeros(len(share.pool.sizes), dtype=torch.float64) for _ in range(2))
    for batch_ids, count in lockstep_batches(share.local_ids(), share.batch_size, share.num_batches(), filler=FIRST_ID):
        samples = loss_fn(collate(share.pool.fetch(batch_ids)))
        if count:
            loss_sum.index_add_(0, samples.domain_ids.cpu(), samples.loss_sum.double().cpu())
            num_tokens.index_add_(0, samples.domain_ids.cpu(), samples.num_tokens.double().cpu())
            if report is not None and samples.report is not None:
                report += samples.report[samples.num_tokens > 0].double().sum(dim=0).cpu()
    return loss_sum, num_tokens
