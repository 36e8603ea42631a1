"""Equally many batches on every rank.

A sharded layer gathers its weights from all ranks when it is called, so all ranks must call the model equally often. A rank
whose samples are used up computes a filler, and its caller drops the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.types import IGNORE_INDEX, Batch

FIRST_ID = np.zeros(1, dtype=np.int64)  # sample 0, which every pool has

Items = TypeVar("Items", np.ndarray, list[Any])


def lockstep_batches(
    items: Items, batch_size: int, num_batches: int, filler: Items | None = None
) -> Iterator[tuple[Items, int]]:
    """This rank's ids or samples -> exactly `num_batches` pairs (a batch, how many of its rows count).

    Args:
        num_batches: the same on every rank: what the rank with the most items needs.
        filler: the batch, of which no row counts, after the last item; None: the first item, or sample 0 without one.
    """
    default: Any = items[:1] if len(items) else FIRST_ID
    for start in range(0, num_batches * batch_size, batch_size):
        batch: Any = items[start : start + batch_size]
        if len(batch):
            yield batch, len(batch)
        else:
            yield default if filler is None else filler, 0


def lockstep_shares(
    pool: SamplePool,
    ids: np.ndarray,
    collate: Callable[[Sequence[Sample]], Batch],
    batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """This rank's contiguous share of [n] ids, in equally many batches on every rank.

    The filler is the first of all ids without its target tokens, so that sums over target tokens need no other care.
    """
    per_rank = -(-len(ids) // dp_size)
    local_ids = ids[dp_rank * per_rank : (dp_rank + 1) * per_rank]
    batches = []
    for batch_ids, count in lockstep_batches(local_ids, batch_size, -(-per_rank // batch_size), filler=ids[:1]):
        samples = pool.fetch(batch_ids)
        batches.append(collate(samples if count else [_without_targets(sample) for sample in samples]))
    return batches


def _without_targets(sample: Sample) -> Sample:
    return replace(sample, labels=np.full_like(sample.labels, IGNORE_INDEX))
