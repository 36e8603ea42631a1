"""Batches of a rank for (plan, step), prefetched in threads.

The loader has no position of its own: what it returns is a function of its arguments. Preparing the next steps of the
same plan while this one trains is only a cache; when the plan changes, prefetched batches are discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import DataError
from dataflex_mega.types import Batch, SamplingPlan


@dataclass(frozen=True)
class BatchPartition:
    """How a global batch is divided: G = dp_size * grad_accumulation * micro_batch_size samples."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    grad_accumulation: int

    @property
    def global_batch_size(self) -> int:
        """G, the samples of one optimizer step over all ranks."""
        return self.dp_size * self.micro_batch_size * self.grad_accumulation

    def local_micro_batches(self, ids: np.ndarray) -> list[np.ndarray]:
        """[G] ids -> this rank's contiguous part of them, in `grad_accumulation` micro-batches."""
        local_ids = np.array_split(ids, self.dp_size)[self.dp_rank]
        size = self.micro_batch_size
        return [local_ids[start : start + size] for start in range(0, len(local_ids), size)]


class Loader:
    """Fetches, collates and prefetches the micro-batches of one rank."""

    def __init__(
        self,
        pool: SamplePool,
        sampler: Sampler,
        partition: BatchPartition,
        collate: Callable[[Sequence[Sample]], Batch],
        prefetch: int = 2,
        workers: int = 1,
    ) -> None:
        """`prefetch` steps are prepared ahead by `workers` threads; prefetch 0 does everything in the caller."""
        self.pool, self.sampler, self.partition, self.collate = pool, sampler, partition, collate
        self.prefetch = prefetch
        self._threads = ThreadPoolExecutor(max(1, workers), "loader") if prefetch else None
        self._prefetched: dict[int, Future[list[Batch]]] = {}
        self._plan: SamplingPlan | None = None

    def micro_batches(self, plan: SamplingPlan, step: int, last_step: int | None = None) -> list[Batch]:
        """This rank's micro-batches of `step`, on the CPU. Nothing at or after `last_step` is prefetched."""
        if self._threads is None:
            return self._build(self._local_ids(plan, step))
        if plan is not self._plan:
            self._discard_prefetched()
            self._plan = plan
        # A step that was not prefetched is built here: handing it to a thread would only add latency.
        batches = None if step in self._prefetched else self._build(self._local_ids(plan, step))
        end = step + 1 + self.prefetch if last_step is None else min(step + 1 + self.prefetch, last_step)
        for later_step in range(step + 1, end):
            if later_step not in self._prefetched and not self._start_prefetch(self._threads, plan, later_step):
                break
        return self._prefetched.pop(step).result() if batches is None else batches

    def _start_prefetch(self, threads: ThreadPoolExecutor, plan: SamplingPlan, step: int) -> bool:
        """Start building a later step. False where the plan cannot serve it: a new plan will have come by then, and if not,
        the error is raised when the step is asked for."""
        try:
            self._prefetched[step] = threads.submit(self._build, self._local_ids(plan, step))
        except DataError:
            return False
        return True

    def _local_ids(self, plan: SamplingPlan, step: int) -> list[np.ndarray]:
        return self.partition.local_micro_batches(self.sampler.global_batch(plan, step))

    def _build(self, micro_batch_ids: list[np.ndarray]) -> list[Batch]:
        return [self.collate(self.pool.fetch(ids)) for ids in micro_batch_ids]

    def _discard_prefetched(self) -> None:
        for future in self._prefetched.values():
            future.cancel()
        self._prefetched.clear()

    def close(self) -> None:
        """Stop the threads and discard what they have prefetched."""
        self._discard_prefetched()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
