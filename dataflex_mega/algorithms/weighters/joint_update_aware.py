"""Sample weights that are optimised jointly: similar to the target, dissimilar to each other, and not too uneven.

DataFlex's rule; it names no paper. With z_i the vectors of the n samples, u that of the target samples, s = Z u and
S = Z Z^T, the weights p on the simplex maximise

    s . p  -  beta / 2  p . S p  +  tau H(p),       H(p) = - sum of p log p

and w = n p. S is positive semi-definite and the entropy strictly concave, so there is one maximum, with
log p = (s - beta S p) / tau + const. DataFlex repeats p <- softmax((s - beta S p) / tau) a few times, which need not
converge; here Newton's method, damped so that every step ascends, finds the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Range, Weighter
from dataflex_mega.algorithms.requests import EmbeddingSignal, Request, TargetEmbeddingSignal
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import EmbeddingSpec, SampleStats

Objective = Literal["full", "align_only", "diverse_only", "uniform"]
MAX_NEWTON_STEPS = 100  # about ten are usual
NEWTON_TOLERANCE = 1e-12  # largest change of log p at which the iteration ends


def solve_exact(target_similarity: Tensor, pairwise_similarity: Tensor, tau: float) -> Tensor:
    """argmax over p in the simplex of s . p - p . B p / 2 + tau H(p).

    Args:
        target_similarity: s, [n] float64.
        pairwise_similarity: B, [n, n] float64, symmetric, positive semi-definite.
        tau: > 0.

    Returns:
        [n] float64, sums to 1.
    """
    s, b = target_similarity, pairwise_similarity
    logs = torch.log_softmax(s / tau, dim=0)
    identity, ones = torch.eye(len(s)).to(b), torch.ones_like(s)
    for _ in range(MAX_NEWTON_STEPS):
        p = logs.exp()
        residual = s - b @ p - tau * logs  # constant at the maximum
        solved = torch.linalg.solve(tau * identity + b * p, torch.stack([residual, ones], dim=1))
        constant = (p @ solved[:, 0]) / (p @ solved[:, 1])
        change = solved[:, 0] - constant * solved[:, 1]  # of log p; it preserves the sum of p to first order
        if float(change.abs().max()) < NEWTON_TOLERANCE:
            break
        logs = ascent_step(logs, change, s, b, tau)
    return logs.exp()


def ascent_step(logs: Tensor, change: Tensor, s: Tensor, b: Tensor, tau: float) -> Tensor:
    """log p moved along `change`, by 1, 1/2, 1/4, ... of it: the first that does not lower the objective."""

    def objective(logs: Tensor) -> Tensor:
        p = logs.exp()
        return s @ p - p @ b @ p / 2 - tau * (p @ logs)

    before, scale = objective(logs), 1.0
    while scale > 1e-9:
        moved = torch.log_softmax(logs + scale * change, dim=0)
        if bool(objective(moved) >= before - 1e-15 * before.abs()):
            return moved
        scale /= 2
    return logs


def solve_fixed_point(
    target_similarity: Tensor, pairwise_similarity: Tensor, tau: float, iterations: int, damping: float
) -> Tensor:
    """DataFlex's iteration from equal weights: p <- (1 - damping) p + damping softmax((s - B p) / tau)."""
    s, b = target_similarity, pairwise_similarity
    p = torch.full_like(s, 1 / len(s))
    for _ in range(iterations):
        p = (1 - damping) * p + damping * torch.softmax((s - b @ p) / tau, dim=0)
    return p


@dataclass
class JointUpdateAware(Weighter):
    """Weights that maximise alignment, diversity and entropy together.

    Args:
        beta: factor of the penalty on similar samples, >= 0.
        tau: factor of the entropy, > 0; large is nearly uniform.
        fixed_point_iters: None: the exact maximum; >= 1: the number of DataFlex's fixed-point iterations.
        damping: of DataFlex's iteration, 0 < damping <= 1; needs fixed_point_iters unless 1.
        target_update_step: steps between two embeddings of the target, >= 1.
        target_batch_size: with target_num_batches, how many target samples are embedded.
        target_num_batches: that many batches of target_batch_size; 0 or less: all samples of the evaluation sets.
        embed_normalize: whether vectors are divided by their length.
        pooling: "last_token" or "mean_pool": how a sample's hidden states become its vector.
        embed_layer: which hidden states, as transformers counts them; -1: the last.
        objective_mode: "full"; "align_only" without S; "diverse_only" without s; "uniform": every weight is 1.
    """

    beta: Annotated[float, Range(ge=0)] = 0.1
    tau: Annotated[float, Range(gt=0)] = 0.05
    fixed_point_iters: Annotated[int | None, Range(ge=1)] = None
    damping: Annotated[float, Range(gt=0, le=1)] = 1.0
    target_update_step: Annotated[int, Range(ge=1)] = 50
    target_batch_size: Annotated[int, Range(ge=1)] = 1
    target_num_batches: int = 0
    embed_normalize: bool = True
    pooling: Literal["last_token", "mean_pool"] = "last_token"
    embed_layer: int = -1
    objective_mode: Objective = "full"
    _target: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [h] float64
    _target_step: int = field(default=-1, init=False, repr=False)  # the step at which it was received

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed_point_iters is None and self.damping != 1:
            key = "weighter.joint_update_aware.damping"
            raise ConfigError(f"{key}: has no effect without fixed_point_iters, found {self.damping}")

    def requests(self) -> tuple[Request, ...]:
        pooling = "last" if self.pooling == "last_token" else "mean"
        spec = EmbeddingSpec(pooling, self.embed_layer, self.embed_normalize)
        num_targets = max(0, self.target_num_batches) * self.target_batch_size
        return (EmbeddingSignal(spec), TargetEmbeddingSignal(spec, num_targets))

    def is_due(self, request: Request, step: int) -> bool:
        """True before the first weights and at every multiple of target_update_step."""
        return self._target is None or (step % self.target_update_step == 0 and step != self._target_step)

    def receive(self, request: Request, value: Tensor, step: int) -> None:
        """Store the target's vector, divided by its length where the samples' are."""
        target = value.double().cpu()
        self._target = target / target.norm().clamp(min=1e-300) if self.embed_normalize else target
        self._target_step = step

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. A sample without target tokens, or whose vector is not finite, weighs 1 and is left out."""
        assert samples.embeddings is not None and self._target is not None, "no target was received"
        vectors = samples.embeddings.double()
        usable = (samples.num_tokens > 0) & torch.isfinite(vectors).all(dim=1)
        weights = torch.ones(len(vectors), dtype=torch.float64, device=vectors.device)
        if self.objective_mode != "uniform" and bool(usable.any()):
            vectors = vectors[usable]
            weights[usable] = len(vectors) * self._solve(vectors, self._target.to(vectors))
        return weights.float()

    def _solve(self, vectors: Tensor, target: Tensor) -> Tensor:
        """[n, h] vectors -> [n] weights p, which sum to 1."""
        similarity, pairwise = vectors @ target, self.beta * (vectors @ vectors.T)
        similarity = torch.zeros_like(similarity) if self.objective_mode == "diverse_only" else similarity
        pairwise = torch.zeros_like(pairwise) if self.objective_mode == "align_only" else pairwise
        if self.fixed_point_iters is not None:
            return solve_fixed_point(similarity, pairwise, self.tau, self.fixed_point_iters, self.damping)
        return solve_exact(similarity, pairwise, self.tau)

    def state_dict(self) -> dict[str, Any]:
        """The target's vector and its step; nothing before it."""
        return {} if self._target is None else {"target": self._target, "target_step": self._target_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._target, self._target_step = state["target"].double(), int(state["target_step"])
