"""Losses of candidates: under the current model by a forward pass, under the reference model from its cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import LossSignal, ReferenceLossSignal
from dataflex_mega.providers.context import CandidateScope
from dataflex_mega.providers.registry import Provider, provides
from dataflex_mega.types import IGNORE_INDEX


@provides(LossSignal, scope="candidates", pairs=True)
class LossProvider(Provider):
    """One forward pass over the candidates. NaN for a candidate without a target token."""

    def compute(self, request: LossSignal, scope: CandidateScope) -> dict[str, Tensor]:
        engine, collate = self.context.engine, self.context.collate
        losses = []
        for samples, _ in scope.batches():
            stats = engine.sample_losses(collate(samples))
            losses.append(stats.loss.float().masked_fill(stats.num_tokens == 0, torch.nan).cpu())
        return {"loss": torch.cat(losses)[: len(scope.ids)]}


@provides(ReferenceLossSignal, scope="candidates", needs_reference=True)
class ReferenceLossProvider(Provider):
    """Means over the token losses that lie beside the samples; no forward pass. NaN for a candidate without a target."""

    def compute(self, request: ReferenceLossSignal, scope: CandidateScope) -> dict[str, Tensor]:
        means = np.full(len(scope.ids), np.nan, dtype=np.float32)
        size = self.context.batch_size
        for start in range(0, len(scope.ids), size):
            for row, sample in enumerate(self.context.pool.fetch(scope.ids[start : start + size]), start):
                assert sample.reference_losses is not None, "attached to the pool when the run was built"
                targets = sample.labels[1:] != IGNORE_INDEX
                if targets.any():
                    means[row] = sample.reference_losses[:-1][targets].mean(dtype=np.float64)
        return {"reference_loss": torch.from_numpy(means)}
