"""Every sample weighs 1: DataFlex's example of a weighter of one's own, kept so that its YAML files run.

Copy this file to start another; `docs/add-an-algorithm.md` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.types import SampleObs


@dataclass
class Custom(Weighter):
    """Weights that change nothing.

    Args:
        strategy: "uniform", the only one.
    """

    strategy: Literal["uniform"] = "uniform"

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n] float32 ones."""
        return torch.ones(len(obs.sample_id), dtype=torch.float32, device=obs.loss_sum.device)
