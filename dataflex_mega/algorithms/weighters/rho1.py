"""Rho-1's selective language modelling: train on the tokens that a reference model has learnt better.

Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need" (arXiv 2404.07965), section 2.2. The excess of a token is its loss
under the model of now minus that under a reference model, not clipped. The loss is the mean over the tokens whose excess is
among the highest `keep` of the batch; the others have no loss, though they are still read. The border is one for all ranks,
found exactly from histograms. Which tokens are compared with which is what `lookahead` says: those of one micro-batch of all
ranks, or of the whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import NeedsReference, SampleObs, TokenChoice


@dataclass
class Rho1(NeedsReference, TokenChoice, Weighter):
    """Keeps the tokens with the highest excess loss.

    All samples weigh 1; a sample counts by the tokens of it that are kept. Tokens whose excess equals that at the border are
    kept all.

    Args:
        keep: share of the target tokens that is kept, 0 < keep <= 1; 1 is plain training.
    """

    keep: float = 0.6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and 0 < self.keep <= 1):
            raise ConfigError(f"weighter.rho1.keep: must be > 0 and <= 1, found {self.keep}")

    def token_scores(self, token_loss: Tensor, reference: Tensor) -> Tensor:
        """The excess losses; of any shape."""
        return token_loss - reference

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n] ones: what differs is inside the samples."""
        return torch.ones_like(obs.loss_sum)
