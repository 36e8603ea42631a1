"""Batches of a rank for (plan, step), prepared ahead in threads.

The loader has no position of its own: what it returns is a function of its arguments. Preparing the next steps of the
same plan while this one trains is therefore only a cache; when the plan changes, what was prepared is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.errors import DataError
from dataflex_mega.types import Batch, Plan

if TYPE_CHECKING:
    from dataflex_mega.data.sampler import Sampler


@dataclass(frozen=True)
class Split:
    """How a global batch is cut: G = ranks * accumulation * micro_batch samples."""

    rank: int  # data-parallel
    ranks: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """G."""
        return self.ranks * self.micro_batch * self.accumulation

    def share(self, ids: np.ndarray) -> list[np.ndarray]:
        """[G] ids -> this rank's contiguous share, cut into `accumulation` micro-batches."""
        mine = np.array_split(ids, self.ranks)[self.rank]
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


class Loader:
    """Fetches, collates and prefetches."""

    def __init__(
        self,
        pool: Pool,
        sampler: Sampler,
        split: Split,
        collate: Callable[[Sequence[Sample]], Batch],
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        """`prefetch` steps are prepared ahead by `workers` threads; prefetch 0 does everything in the caller."""
        self.pool, self.sampler, self.split, self.collate = pool, sampler, split, collate
        self.prefetch = prefetch
        self._threads = ThreadPoolExecutor(max(1, workers), "loader") if prefetch else None
        self._ready: dict[int, Future[list[Batch]]] = {}
        self._plan: Plan | None = None

    def micro_batches(self, plan: Plan, step: int, last_step: int | None = None) -> list[Batch]:
        """This rank's micro-batches of `step`, on the CPU. Nothing at or after `last_step` is prepared ahead."""
        if self._threads is None:
            return self._make(self._ids(plan, step))
        if plan is not self._plan:
            self._drop()
            self._plan = plan
        # What nobody prepared is made here: handing it to a thread to wait for it only costs time.
        made = None if step in self._ready else self._make(self._ids(plan, step))
        ahead = step + 1 + self.prefetch if last_step is None else min(step + 1 + self.prefetch, last_step)
        for wanted in range(step + 1, ahead):
            if wanted not in self._ready and not self._prepare(self._threads, plan, wanted):
                break
        return self._ready.pop(step).result() if made is None else made

    def _prepare(self, threads: ThreadPoolExecutor, plan: Plan, step: int) -> bool:
        """Start a step ahead of time. False where the plan cannot serve it: a new one will have come by then, and if not,
        the error is raised when the step is asked for."""
        try:
            self._ready[step] = threads.submit(self._make, self._ids(plan, step))
        except DataError:
            return False
        return True

    def _ids(self, plan: Plan, step: int) -> list[np.ndarray]:
        return self.split.share(self.sampler.global_batch(plan, step))

    def _make(self, shares: list[np.ndarray]) -> list[Batch]:
        return [self.collate(self.pool.fetch(ids)) for ids in shares]

    def _drop(self) -> None:
        for future in self._ready.values():
            future.cancel()
        self._ready.clear()

    def close(self) -> None:
        """Stop the threads."""
        self._drop()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
