"""Projected gradients of a run's samples, with the current model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.engines.per_sample import nonzero_targets
from dataflex_mega.providers.context import SignalContext
from dataflex_mega.store.layout import StoreLayout
from dataflex_mega.types import Batch, ProjectionSpec


class GradientFeatures:
    """Every rank makes one. Raises ConfigError where the engine or the optimizer cannot give gradient features."""

    def __init__(self, context: SignalContext, spec: ProjectionSpec, adam: bool) -> None:
        self.context, self.spec = context, spec
        self.maker = context.engine.feature_maker(spec, adam)
        self.batch_size = context.batch_size

    def identity(self) -> dict[str, Any]:
        """What the features belong to: the model, the data and the projection, as plain values by name."""
        spec, context = self.spec, self.context
        return {
            "model": self.maker.fingerprint(),
            "data": run_on_main(context.collectives, context.pool.content_hash),
            "cutoff_len": context.cutoff_len,
            "gradient": "adam" if self.maker.adam else "sgd",
            "projection": {"kind": spec.kind, "size": spec.size, "seed": spec.seed},
        }

    def layout(self, block_size: int) -> StoreLayout:
        """Of a new store in blocks of `block_size` samples: one shard per process."""
        pool = self.context.pool
        return StoreLayout(len(pool), self.maker.width, self.context.parallel_info.dp_size, min(block_size, len(pool)))

    def rows(self, ids: np.ndarray, num_batches: int) -> Tensor:
        """[n] global ids -> [n, width], in `num_batches` batches; equally many on every rank."""
        rows = []
        for batch_ids, count in lockstep_batches(ids, self.batch_size, num_batches):
            batch = self.context.collate_unpacked(self.context.pool.fetch(batch_ids))
            rows.append(self.maker.features(batch).cpu()[:count])
        return torch.cat(rows)

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Tensor:
        """Groups of this rank's target batches -> [S, width]: the mean over all ranks of the targets' features, each with
        length 1. Rows without a target token do not count."""
        collectives, means = self.context.collectives, []
        for batches in groups:
            total, count = torch.zeros(self.maker.width), torch.zeros(())
            for batch in batches:
                features = self.maker.features(batch, plain=True).cpu().float()
                length = features.norm(dim=1, keepdim=True)
                total += torch.where(length > 0, features / length, 0.0).sum(0)
                count += (length > 0).sum()
            means.append(collectives.all_reduce_sum(total) / nonzero_targets(collectives.all_reduce_sum(count)))
        return torch.stack(means)
