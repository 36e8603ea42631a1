"""Gradients of the batch that a step is about to train: with targets, and with each other; the work divided over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.providers.stored_gradients import Features
from dataflex_mega.types import NeedsBatchGradients

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build

TARGETS = 11  # random stream


def batch_gradients(run: Build, engine: Any) -> Callable[[np.ndarray, int], tuple[Tensor, Tensor]] | None:
    """For the controller: ([G] ids of a step, its number) -> ([G] inner products with the targets' mean gradient, [G, G]
    with each other), equal on all ranks; None when no weighter asks. Every rank must call it."""
    weighter = run.roles.weighter
    if not isinstance(weighter, NeedsBatchGradients):
        return None
    features = Features.of(run, engine, weighter.feature_spec(), weighter.preconditioned)
    groups = list(run.evaluation.values())

    def look(ids: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        features.maker.refresh()
        target = _mean(features, _drawn(groups, weighter.target_batch, run.data_seed, step))
        share = len(ids) // run.mesh.dp_size  # the batch divides evenly, or no run would have begun
        mine = ids[run.mesh.dp_rank * share : (run.mesh.dp_rank + 1) * share]
        rows = run.ranks.gather(features.rows(mine, -(-share // features.batch_size)).float())
        return rows @ target, rows @ rows.t()

    return look


def _drawn(groups: Sequence[Pool], count: int, seed: int, step: int) -> list[Sample]:
    """`count` samples of all groups, or all when it is 0 or more than there are: a function of seed and step."""
    everything = sum(len(group) for group in groups)
    places = np.arange(everything)
    if 0 < count < everything:
        places = np.sort(np.random.default_rng([seed, step, TARGETS]).choice(everything, count, replace=False))
    samples, first = [], 0
    for group in groups:
        here = places[(places >= first) & (places < first + len(group))] - first
        samples += group.fetch(here) if len(here) else []
        first += len(group)
    return samples


def _mean(features: Features, samples: list[Sample]) -> Tensor:
    """[width] the mean of the samples' plain features over all ranks, each sample on one of them."""
    run, size = features.run, features.batch_size
    per_rank = -(-len(samples) // run.mesh.dp_size)
    mine = samples[run.mesh.dp_rank * per_rank : (run.mesh.dp_rank + 1) * per_rank]
    total = torch.zeros(features.maker.width)
    for start in range(0, per_rank, size):
        here = mine[start : start + size]
        # A rank without one computes the first and drops it: sharded layers are called together.
        found = features.maker.features(features.collate(here or samples[:1]), plain=True)
        total += found.cpu().float()[: len(here)].sum(0)
    return run.ranks.sum(total) / len(samples)
