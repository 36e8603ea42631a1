"""Gradients of the batch that a step is about to train: with targets, and with each other; the work divided over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import BatchGradientSignal
from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.providers.context import BatchScope, SignalContext
from dataflex_mega.providers.gradient_features import GradientFeatures
from dataflex_mega.providers.registry import Provider, provides
from dataflex_mega.rng_streams import RngStream
from dataflex_mega.types import BatchGradients


@provides(BatchGradientSignal, scope="batch", requires={Capability.GRADIENT_FEATURES}, needs_targets=True)
class BatchGradientProvider(Provider):
    """Projected gradients of the batch, gathered; features are made once per run and refreshed at every step."""

    def __init__(self, context: SignalContext) -> None:
        super().__init__(context)
        self._features: dict[BatchGradientSignal, GradientFeatures] = {}

    def compute(self, request: BatchGradientSignal, scope: BatchScope) -> BatchGradients:
        c = self.context
        if request not in self._features:
            self._features[request] = GradientFeatures(c, request.projection, request.adam)
        features, ids = self._features[request], scope.ids()
        features.maker.refresh()
        samples = draw_targets(list(c.evaluation.values()), request.num_targets, c.seed, scope.step)
        target = mean_features(features, samples)
        per_rank = len(ids) // c.parallel_info.dp_size  # the batch divides evenly, or no run would have begun
        local_ids = ids[c.parallel_info.dp_rank * per_rank : (c.parallel_info.dp_rank + 1) * per_rank]
        rows = c.collectives.all_gather(features.rows(local_ids, -(-per_rank // features.batch_size)).float())
        return BatchGradients(torch.from_numpy(ids), rows @ target, rows @ rows.t())


def draw_targets(groups: Sequence[SamplePool], count: int, seed: int, step: int) -> list[Sample]:
    """`count` samples of all groups, or all when it is 0 or more than there are: a function of seed and step."""
    num_targets = sum(len(group) for group in groups)
    rows = np.arange(num_targets)
    if 0 < count < num_targets:
        rows = np.sort(
            np.random.default_rng([seed, step, RngStream.TARGET_BATCH]).choice(num_targets, count, replace=False)
        )
    samples, first = [], 0
    for group in groups:
        in_group = rows[(rows >= first) & (rows < first + len(group))] - first
        samples += group.fetch(in_group) if len(in_group) else []
        first += len(group)
    return samples


def mean_features(features: GradientFeatures, samples: list[Sample]) -> Tensor:
    """[width] the mean of the samples' plain features over all ranks, each sample on one of them."""
    c = features.context
    per_rank = -(-len(samples) // c.parallel_info.dp_size)
    local_rows = np.arange(len(samples))[c.parallel_info.dp_rank * per_rank : (c.parallel_info.dp_rank + 1) * per_rank]
    total = torch.zeros(features.maker.width)
    for rows, count in lockstep_batches(local_rows, features.batch_size, -(-per_rank // features.batch_size)):
        batch = c.collate_unpacked([samples[row] for row in rows])
        total += features.maker.features(batch, plain=True).cpu().float()[:count].sum(0)
    return c.collectives.all_reduce_sum(total) / len(samples)
