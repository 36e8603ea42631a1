"""RHO-LOSS: the samples whose loss can still fall, compared with a reference model.

Mindermann et al. 2022, "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt" (arXiv
2206.07137). The score is the reducible holdout loss: the mean token loss under the current model minus that under a
reference model that was trained on held-out data. What is noise is hard for both, what is known is easy for both, and what
is rare in the held-out data is hard for the reference; none of these scores high. The paper takes the best tenth of a large
batch at every step; here the candidates are the whole pool, scored at every update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.algorithms.requests import LossSignal, ReferenceLossSignal, Request
from dataflex_mega.errors import DataError
from dataflex_mega.types import SignalTable, UpdateContext


@dataclass
class RhoLoss(Selector):
    """The largest reducible losses.

    Candidates with equal scores are taken in the order of the pool, so the selection is the same everywhere.

    Args: none; `update_step` times the batch size gives the number of samples.
    """

    def requests(self) -> tuple[Request, ...]:
        return (LossSignal(), ReferenceLossSignal())

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: loss minus reference loss; minus infinity where that is not finite."""
        gap = (table["loss"] - table["reference_loss"]).float()
        return torch.where(torch.isfinite(gap), gap, -torch.inf)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[N] scores -> [count] positions, best first. Raises DataError when fewer than that have a finite score."""
        finite = int(torch.isfinite(scores).sum())
        if finite < count:
            raise DataError(f"selector rho_loss: {count} samples wanted, {finite} have a finite loss")
        return torch.sort(scores, descending=True, stable=True).indices[:count]
