"""The update that several mixers share."""

from __future__ import annotations

import torch
from torch import Tensor


def exponentiated_gradient_step(weights: Tensor, gains: Tensor, eta: float, smoothing: float) -> Tensor:
    """[k] float64 weights, [k] gains -> (1 - c) softmax(log weights + eta gains) + c / k with c the smoothing.

    The result sums to 1, and each weight is at least c / k.
    """
    ascended = torch.softmax(weights.log() + eta * gains, dim=0)
    smoothed = (1 - smoothing) * ascended + smoothing / len(weights)
    return smoothed / smoothed.sum()
