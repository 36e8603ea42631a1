"""use_dft_loss: cross-entropy times the probability of the target (dynamic fine-tuning, arXiv 2508.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dataflex_mega.losses.base import LossForm, TokenOutputs


@dataclass(frozen=True)
class DynamicFineTuning(LossForm):
    """p ce with p = exp(-ce), through which no gradient flows."""

    reads_logits: ClassVar[bool] = False

    def token_losses(self, tokens: TokenOutputs) -> Tensor:
        return (-tokens.cross_entropy.detach()).exp() * tokens.cross_entropy
