"""Sample weights by likeness to target samples: ADAPT's adaptive rates of samples.

arXiv 2605.05227 (ICLR 2026), in the form that DataFlex gives it: its paper was not compared. A sample's vector phi is the
mean of its last hidden states, position t weighing t, divided by its length. With anchors a, the vectors of the target
samples under the model of now or of a few steps ago:

    s_i = mean over a of phi_i . phi_a,   f_i = min(sigmoid(s_i / tau), clip),   w_i = f_i / mean of f

The mean over anchors is taken once: s_i = phi_i . (mean of phi_a), so one vector is kept and one number a sample travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import HiddenSpec, NeedsHidden, SampleObs


@dataclass
class Adapt(NeedsHidden, Weighter):
    """Weights by the mean cosine with the target samples.

    Args:
        tau: temperature, > 0. At 1 the largest weight is at most e times the smallest; smaller is sharper.
        refresh_interval: steps after which the anchors are embedded anew, >= 1.
        clip: upper bound of f, > 0; None: no bound.
        anchor_batch_size: stands in DataFlex's files; score_batch_size says it here, and it changes no result.
        eps: the same; a vector is divided by its length as it is.
    """

    tau: float = 1.0
    refresh_interval: int = 50
    clip: float | None = None
    anchor_batch_size: int | None = None
    eps: float | None = None
    _anchor: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [h] float64
    _learnt: int = field(default=-1, init=False, repr=False)  # the step at which it was taken

    def __post_init__(self) -> None:
        for key, value in (("tau", self.tau), ("clip", self.clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"weighter.adapt.{key}: must be finite and > 0, found {value}")
        if self.refresh_interval < 1:
            raise ConfigError(f"weighter.adapt.refresh_interval: must be >= 1, found {self.refresh_interval}")

    @property
    def hidden(self) -> HiddenSpec:
        """Late positions count more."""
        return HiddenSpec("late")

    def stale(self, step: int) -> bool:
        """Before the first weights, and at every multiple of refresh_interval."""
        return self._anchor is None or (step % self.refresh_interval == 0 and step != self._learnt)

    def learn(self, target: Tensor, step: int) -> None:
        """Keep the mean of the anchors."""
        self._anchor, self._learnt = target.double().cpu(), step

    def compare(self, hidden: Tensor) -> Tensor:
        """[n, h] -> [n, 1] float32 mean cosines."""
        assert self._anchor is not None, "learn was not called"
        return (hidden.double() @ self._anchor.to(hidden.device).unsqueeze(1)).float()

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens, or with hidden states that are not finite, weighs 1."""
        assert obs.hidden is not None
        scores = obs.hidden[:, 0].double()
        counted = (obs.tokens > 0) & torch.isfinite(scores)
        f = torch.sigmoid(scores / self.tau).clamp(max=self.clip or math.inf).masked_fill(~counted, 0)
        return torch.where(counted, f * (counted.sum() / f.sum().clamp(min=1e-300)), 1.0).float()

    def state(self) -> dict[str, Any]:
        """The anchors' mean and its step; nothing before it."""
        return {} if self._anchor is None else {"anchor": self._anchor, "learnt": self._learnt}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if state:
            self._anchor, self._learnt = state["anchor"].double(), int(state["learnt"])
