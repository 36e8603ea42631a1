"""use_eaft_loss: cross-entropy times a power of the entropy of the prediction (arXiv 2601.02151)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dataflex_mega.losses.base import LossForm, TokenOutputs

LARGEST = 20  # logits of which the entropy is computed
SCALE = 3.0  # about log(20), the largest entropy of so many


@dataclass(frozen=True)
class EntropyAdaptive(LossForm):
    """ce (H / 3)^alpha, where H is the entropy of the 20 largest probabilities, made to sum to 1; no gradient flows through
    it. `alpha` 0 is plain cross-entropy."""

    alpha: float

    def token_losses(self, tokens: TokenOutputs) -> Tensor:
        log_p = tokens.vocabulary.largest(tokens.logits, LARGEST).log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        return tokens.cross_entropy * (entropy / SCALE).pow(self.alpha)
