"""Focal weights: samples that the model already predicts well count less.

Lin et al. 2017, "Focal Loss for Dense Object Detection" (arXiv 1708.02002): a target of probability p weighs
(1 - p) ** gamma. Here p = exp(-L), L the mean loss of a sample's target tokens, so p is the geometric mean of their
probabilities. The factors are divided by their mean over the batch, which preserves the size of the step; unlike in the
paper no gradient flows through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.types import SampleStats


def focal_factor(losses: Tensor, gamma: float) -> Tensor:
    """[n] losses -> [n] float64 (1 - exp(-loss)) ** gamma in 0..1; 0 ** 0 is 1, and a loss below 0 counts as 0."""
    return (-torch.expm1(-losses.double().clamp(min=0))) ** gamma


@dataclass
class Focal(Weighter):
    """Weights by how badly a sample is predicted.

    Args:
        gamma: how strongly well predicted samples are weighted down, >= 0. 0: all weigh the same.
    """

    gamma: Annotated[float, Range(ge=0)] = 2.0

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1.

        A sample without target tokens, or with a loss that is NaN or infinite, weighs 1 and influences no other. When
        every factor is 0 (all predicted with certainty) all weigh 1.
        """
        losses = samples.loss.detach()
        known = torch.isfinite(losses) & (samples.num_tokens > 0)
        factors = torch.where(known, focal_factor(losses, self.gamma), 0.0)
        if len(factors) == 0:
            return torch.ones_like(losses, dtype=torch.float32)
        largest = factors.amax()
        relative = factors / largest  # a sum of tiny factors would underflow
        weights = relative * known.sum() / relative.sum()
        return torch.where(known & (largest > 0), weights, 1.0).float()  # decided on the device: no wait for it
