"""use_asft_loss: the form of use_dft_loss, held near a frozen model (anchored fine-tuning, arXiv 2509.23753)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from dataflex_mega.losses.base import LossForm, TokenOutputs
from dataflex_mega.losses.dft import DynamicFineTuning


@dataclass(frozen=True)
class Anchored(LossForm):
    """p ce + alpha KL(q || p), where q is the reference model's prediction."""

    alpha: float
    needs_reference: ClassVar[bool] = True

    def token_losses(self, tokens: TokenOutputs) -> Tensor:
        assert tokens.reference_logits is not None
        log_p = tokens.logits.log_softmax(dim=-1)
        q = tokens.reference_logits.softmax(dim=-1)
        divergence = F.kl_div(log_p, q, reduction="none").sum(dim=-1)
        return DynamicFineTuning().token_losses(tokens) + self.alpha * divergence
