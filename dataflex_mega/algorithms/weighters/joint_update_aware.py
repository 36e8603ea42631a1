"""Sample weights that are chosen together: near to the target, unlike each other, and not too uneven.

DataFlex's rule; it names no paper. With z_i the vectors of the n samples, u that of the target samples, s = Z u and
S = Z Z^T, the weights p on the simplex maximise

    s . p  -  beta / 2  p . S p  +  tau H(p),       H(p) = - sum of p log p

and w = n p. S is positive semi-definite and the entropy strictly concave, so there is one maximum, with
log p = (s - beta S p) / tau + const. DataFlex repeats p <- softmax((s - beta S p) / tau) a few times, which need not
converge; here Newton's method, damped so that every step climbs, finds the maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Weighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import HiddenSpec, NeedsHidden, SampleObs

Objective = Literal["full", "align_only", "diverse_only", "uniform"]
MOST_STEPS = 100  # of Newton's method, which needs about ten
EXACT = 1e-12  # how far log p may be from the condition of the maximum


def maximum(alike: Tensor, between: Tensor, tau: float) -> Tensor:
    """argmax over the simplex of alike . p - p . between p / 2 + tau H(p).

    Args:
        alike: [n] float64.
        between: [n, n] float64, symmetric, positive semi-definite.
        tau: > 0.

    Returns:
        [n] float64, sums to 1.
    """
    logs = torch.log_softmax(alike / tau, dim=0)
    identity, ones = torch.eye(len(alike)).to(between), torch.ones_like(alike)
    for _ in range(MOST_STEPS):
        p = logs.exp()
        short = alike - between @ p - tau * logs  # constant at the maximum
        solved = torch.linalg.solve(tau * identity + between * p, torch.stack([short, ones], dim=1))
        constant = (p @ solved[:, 0]) / (p @ solved[:, 1])
        change = solved[:, 0] - constant * solved[:, 1]  # of log p; it keeps the sum of p to first order
        if float(change.abs().max()) < EXACT:
            break
        logs = climb(logs, change, alike, between, tau)
    return logs.exp()


def climb(logs: Tensor, change: Tensor, alike: Tensor, between: Tensor, tau: float) -> Tensor:
    """log p moved along `change`, by 1, 1/2, 1/4, ... of it: the first that does not lower the objective."""

    def value(logs: Tensor) -> Tensor:
        p = logs.exp()
        return alike @ p - p @ between @ p / 2 - tau * (p @ logs)

    before, part = value(logs), 1.0
    while part > 1e-9:
        moved = torch.log_softmax(logs + part * change, dim=0)
        if bool(value(moved) >= before - 1e-15 * before.abs()):
            return moved
        part /= 2
    return logs


def repeated(alike: Tensor, between: Tensor, tau: float, times: int, damping: float) -> Tensor:
    """DataFlex's iteration from equal weights: p <- (1 - damping) p + damping softmax((alike - between p) / tau)."""
    p = torch.full_like(alike, 1 / len(alike))
    for _ in range(times):
        p = (1 - damping) * p + damping * torch.softmax((alike - between @ p) / tau, dim=0)
    return p


@dataclass
class JointUpdateAware(NeedsHidden, Weighter):
    """Weights that maximise alignment, diversity and entropy together.

    Args:
        beta: how much likeness among the chosen costs, >= 0.
        tau: how much evenness is worth, > 0; large is nearly uniform.
        fixed_point_iters: None: the maximum itself; a number >= 1: DataFlex's iteration, that often.
        damping: of DataFlex's iteration, 0 < damping <= 1; needs fixed_point_iters unless 1.
        target_update_step: steps after which the target is embedded anew, >= 1.
        target_batch_size: with target_num_batches, how many target samples are looked at.
        target_num_batches: that many batches of target_batch_size; 0 or less: all samples of the evaluation sets.
        embed_normalize: whether vectors are divided by their length.
        pooling: "last_token" or "mean_pool": how a sample's hidden states become its vector.
        embed_layer: which hidden states, as transformers counts them; -1: the last.
        objective_mode: "full"; "align_only" without S; "diverse_only" without s; "uniform": every weight is 1.
    """

    beta: float = 0.1
    tau: float = 0.05
    fixed_point_iters: int | None = None
    damping: float = 1.0
    target_update_step: int = 50
    target_batch_size: int = 1
    target_num_batches: int = 0
    embed_normalize: bool = True
    pooling: Literal["last_token", "mean_pool"] = "last_token"
    embed_layer: int = -1
    objective_mode: Objective = "full"
    _target: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [h] float64
    _learnt: int = field(default=-1, init=False, repr=False)  # the step at which it was taken

    def __post_init__(self) -> None:
        key = "weighter.joint_update_aware."
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"{key}tau: must be finite and > 0, found {self.tau}")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ConfigError(f"{key}beta: must be finite and >= 0, found {self.beta}")
        if not 0 < self.damping <= 1:
            raise ConfigError(f"{key}damping: must be > 0 and <= 1, found {self.damping}")
        if self.fixed_point_iters is None and self.damping != 1:
            raise ConfigError(f"{key}damping: has no effect without fixed_point_iters, found {self.damping}")
        for name in ("fixed_point_iters", "target_update_step", "target_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{key}{name}: must be >= 1, found {value}")

    @property
    def hidden(self) -> HiddenSpec:
        """As the parameters say."""
        return HiddenSpec("last" if self.pooling == "last_token" else "mean", self.embed_layer, self.embed_normalize)

    @property
    def target_samples(self) -> int:
        """target_num_batches of target_batch_size; 0: all."""
        return max(0, self.target_num_batches) * self.target_batch_size

    def stale(self, step: int) -> bool:
        """Before the first weights, and at every multiple of target_update_step."""
        return self._target is None or (step % self.target_update_step == 0 and step != self._learnt)

    def learn(self, target: Tensor, step: int) -> None:
        """Keep the target's vector, divided by its length where the samples' are."""
        target = target.double().cpu()
        self._target = target / target.norm().clamp(min=1e-300) if self.embed_normalize else target
        self._learnt = step

    def compare(self, hidden: Tensor) -> Tensor:
        """[n, h] as it is: S needs all of it."""
        return hidden

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens, or whose vector is not finite, weighs 1 and is left out."""
        assert obs.hidden is not None and self._target is not None, "learn was not called"
        vectors = obs.hidden.double()
        counted = (obs.tokens > 0) & torch.isfinite(vectors).all(dim=1)
        found = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
        if self.objective_mode != "uniform" and bool(counted.any()):
            vectors = vectors[counted]
            found[counted] = len(vectors) * self._shares(vectors, self._target.to(vectors))
        return found.float()

    def _shares(self, vectors: Tensor, target: Tensor) -> Tensor:
        """[n, h] vectors -> [n] p."""
        alike, between = vectors @ target, self.beta * (vectors @ vectors.T)
        alike = torch.zeros_like(alike) if self.objective_mode == "diverse_only" else alike
        between = torch.zeros_like(between) if self.objective_mode == "align_only" else between
        if self.fixed_point_iters is not None:
            return repeated(alike, between, self.tau, self.fixed_point_iters, self.damping)
        return maximum(alike, between, self.tau)

    def state(self) -> dict[str, Any]:
        """The target's vector and its step; nothing before it."""
        return {} if self._target is None else {"target": self._target, "learnt": self._learnt}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if state:
            self._target, self._learnt = state["target"].double(), int(state["learnt"])
