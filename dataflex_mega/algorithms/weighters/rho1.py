"""Rho-1's selective language modelling: train on the tokens that a reference model predicts better.

Lin et al. 2024, "Rho-1: Not All Tokens Are What You Need" (arXiv 2404.07965), section 2.2. The excess of a token is its loss
under the current model minus that under a reference model, not clipped. The loss is the mean over the fraction `keep_ratio`
of the tokens with the highest excess; the other tokens stay in the context and have no loss. All ranks use one threshold,
which is exact and computed from histograms. `weight_scope` says which tokens are compared: those of one micro-batch of all
ranks, or of the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.algorithms.requests import ReferenceLossSignal, Request
from dataflex_mega.types import SampleStats, TokenSelection


def excess_losses(token_losses: Tensor, reference_losses: Tensor) -> Tensor:
    """Their difference, in the shape of both; not clipped."""
    return token_losses - reference_losses


@dataclass
class Rho1(Weighter):
    """Selects the tokens with the highest excess loss.

    All samples have weight 1; a sample counts by its selected tokens. All tokens whose excess equals the threshold are
    selected.

    Args:
        keep_ratio: fraction of the target tokens that is selected, 0 < keep_ratio <= 1; 1 is plain training.
    """

    renamed: ClassVar[Mapping[str, str]] = {"keep": "keep_ratio"}

    keep_ratio: Annotated[float, Range(gt=0, le=1)] = 0.6

    def requests(self) -> tuple[Request, ...]:
        return (ReferenceLossSignal(),)

    def token_selection(self) -> TokenSelection:
        return TokenSelection(self.keep_ratio, excess_losses)

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] ones: only tokens inside the samples differ."""
        return torch.ones_like(samples.loss_sum)
