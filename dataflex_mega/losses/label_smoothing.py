"""label_smoothing_factor: a share of the target's probability mass is spread over the vocabulary (arXiv 1512.00567)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dataflex_mega.losses.base import LossForm, TokenOutputs


@dataclass(frozen=True)
class LabelSmoothing(LossForm):
    """(1 - e) ce + e u, where u is the mean of -log p over the vocabulary.

    With the logits z and their mean m, -log p_v = ce + z_target - z_v, so u = ce + z_target - m.
    """

    factor: float

    def token_losses(self, tokens: TokenOutputs) -> Tensor:
        vocabulary = tokens.vocabulary
        above_mean = vocabulary.at(tokens.logits, tokens.labels) - vocabulary.mean(tokens.logits)
        return tokens.cross_entropy + self.factor * above_mean
