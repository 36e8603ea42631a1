"""Gradients of the batch that a step is about to train: with targets, and with each other; the work divided over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.providers.stored_gradients import Features
from dataflex_mega.rng_streams import RngStream
from dataflex_mega.types import NeedsBatchGradients

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build


def batch_gradients(run: Build, engine: Any) -> Callable[[np.ndarray, int], tuple[Tensor, Tensor]] | None:
    """For the controller: ([G] ids of a step, its number) -> ([G] inner products with the targets' mean gradient, [G, G]
    with each other), equal on all ranks; None when no weighter asks. Every rank must call it."""
    weighter = run.roles.weighter
    if not isinstance(weighter, NeedsBatchGradients):
        return None
    features = Features.of(run, engine, weighter.feature_spec(), weighter.uses_adam)
    groups = list(run.evaluation.values())

    def look(ids: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        features.maker.refresh()
        target = _mean(features, _drawn(groups, weighter.target_batch, run.data_seed, step))
        share = len(ids) // run.parallel_info.dp_size  # the batch divides evenly, or no run would have begun
        mine = ids[run.parallel_info.dp_rank * share : (run.parallel_info.dp_rank + 1) * share]
        rows = run.collectives.all_gather(features.rows(mine, -(-share // features.batch_size)).float())
        return rows @ target, rows @ rows.t()

    return look


def _drawn(groups: Sequence[SamplePool], count: int, seed: int, step: int) -> list[Sample]:
    """`count` samples of all groups, or all when it is 0 or more than there are: a function of seed and step."""
    everything = sum(len(group) for group in groups)
    places = np.arange(everything)
    if 0 < count < everything:
        places = np.sort(np.random.default_rng([seed, step, RngStream.TARGET_BATCH]).choice(everything, count, replace=False))
    samples, first = [], 0
    for group in groups:
        here = places[(places >= first) & (places < first + len(group))] - first
        samples += group.fetch(here) if len(here) else []
        first += len(group)
    return samples


def _mean(features: Features, samples: list[Sample]) -> Tensor:
    """[width] the mean of the samples' plain features over all ranks, each sample on one of them."""
    run, size = features.run, features.batch_size
    per_rank = -(-len(samples) // run.parallel_info.dp_size)
    mine = samples[run.parallel_info.dp_rank * per_rank : (run.parallel_info.dp_rank + 1) * per_rank]
    total = torch.zeros(features.maker.width)
    for batch, count in lockstep_batches(mine, size, -(-per_rank // size), filler=samples[:1]):
        rows = features.maker.features(features.collate(batch), plain=True)
        total += rows.cpu().float()[:count].sum(0)
    return run.collectives.all_reduce_sum(total) / len(samples)
