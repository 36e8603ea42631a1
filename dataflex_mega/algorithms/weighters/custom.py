"""Weight 1 for every sample: DataFlex's example of a custom weighter, here so that its YAML files run.

Copy this file to start a weighter of your own; `docs/add-an-algorithm.md` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.types import SampleStats


@dataclass
class UniformWeighter(Weighter):
    """Weights that change nothing.

    Args:
        strategy: "uniform", the only one.
    """

    strategy: Literal["uniform"] = "uniform"

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """Ones for n samples, [n] float32."""
        return torch.ones(len(samples.sample_ids), dtype=torch.float32, device=samples.loss_sum.device)
