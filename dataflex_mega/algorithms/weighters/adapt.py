"""Sample weights by similarity to target samples: ADAPT's adaptive sample rates.

arXiv 2605.05227 (ICLR 2026), in the form that DataFlex gives it; it was not compared with the paper. A sample's vector phi
is the mean of its last hidden states, position t with weight t, divided by its length. With anchors a, the vectors of the
target samples under the current model or the model of a few steps ago:

    s_i = mean over a of phi_i . phi_a,   f_i = min(sigmoid(s_i / tau), clip),   w_i = f_i / mean of f

The mean over anchors is taken once, s_i = phi_i . (mean of phi_a): one vector is stored, one number per sample gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.algorithms.requests import EmbeddingSignal, Request, TargetEmbeddingSignal
from dataflex_mega.types import EmbeddingSpec, SampleStats


@dataclass
class Adapt(Weighter):
    """Weights by the mean cosine with the target samples.

    Args:
        tau: temperature, > 0. At 1 the largest weight is at most e times the smallest; smaller is sharper.
        refresh_interval: steps between two embeddings of the anchors, >= 1.
        clip: upper bound of f, > 0; None: no bound.
    """

    tau: Annotated[float, Range(gt=0)] = 1.0
    refresh_interval: Annotated[int, Range(ge=1)] = 50
    clip: Annotated[float | None, Range(gt=0)] = None
    _anchor: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [h] float64
    _target_step: int = field(default=-1, init=False, repr=False)  # the step at which it was received

    def requests(self) -> tuple[Request, ...]:
        spec = EmbeddingSpec("position_weighted")
        return (EmbeddingSignal(spec), TargetEmbeddingSignal(spec))

    def is_due(self, request: Request, step: int) -> bool:
        """True before the first weights and at every multiple of refresh_interval."""
        return self._anchor is None or (step % self.refresh_interval == 0 and step != self._target_step)

    def receive(self, request: Request, value: Tensor, step: int) -> None:
        """Store the mean vector of the anchors."""
        self._anchor, self._target_step = value.double().cpu(), step

    def reduce(self, samples: SampleStats) -> SampleStats:
        """[n, h] vectors -> [n, 1] float32 mean cosines with the anchors."""
        assert samples.embeddings is not None and self._anchor is not None, "no anchors were received"
        anchor = self._anchor.to(samples.embeddings.device).unsqueeze(1)
        return replace(samples, embeddings=(samples.embeddings.double() @ anchor).float())

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens, or with hidden states that are not finite, weighs 1."""
        assert samples.embeddings is not None
        scores = samples.embeddings[:, 0].double()
        usable = (samples.num_tokens > 0) & torch.isfinite(scores)
        f = torch.sigmoid(scores / self.tau).clamp(max=self.clip or math.inf).masked_fill(~usable, 0)
        return torch.where(usable, f * (usable.sum() / f.sum().clamp(min=1e-300)), 1.0).float()

    def state_dict(self) -> dict[str, Any]:
        """The anchors' mean and its step; nothing before it."""
        return {} if self._anchor is None else {"anchor": self._anchor, "target_step": self._target_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._anchor, self._target_step = state["anchor"].double(), int(state["target_step"])
