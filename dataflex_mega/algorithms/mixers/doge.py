"""DoGE: draw more of the domains whose gradient points in the direction of the target's.

Fan et al. 2023, "DoGE: Domain Reweighting with Generalization Estimation" (arXiv 2310.15393). With g_i the gradient of
domain i's mean token loss, taken at each update on a probe of its samples:

    alignment   W_i = <g_i, sum over j != i of g_j>          or <g_i, g_t> for a target t
    score       s_i = W_i / mean over j of |g_j|, cut to 0..max_score
    weights     w   ~ w exp(eta s)

The paper's proxy weights the gradients of an even batch by w; here domains are drawn in w, which is the same in expectation.
Its eta is the learning rate over mu, 1e-3 / 0.05, at every step. A larger model draws by the mean of w over the updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.algorithms.requests import DomainGradientSignal, Request
from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import UpdateContext

Against = Literal["others", "eval"]
EPS = 1e-6  # of the official code: added to the mean length


def alignment_scores(gram: Tensor, num_domains: int, against: Against, max_score: float) -> Tensor:
    """Inner products of gradients, [k, k] or with the target last [k + 1, k + 1] float64 -> [k] scores in 0..max_score."""
    domain_gram = gram[:num_domains, :num_domains]
    norms = domain_gram.diagonal().clamp(min=0).sqrt()
    alignment = (
        gram[:num_domains, num_domains] if against == "eval" else domain_gram.sum(dim=1) - domain_gram.diagonal()
    )
    return (alignment / (norms.mean() + EPS)).clamp(min=0.0, max=max_score)


def exponentiated_gradient_step(weights: Tensor, score: Tensor, eta: float) -> Tensor:
    """[k] float64 after one update; sums to 1."""
    return torch.softmax(weights.log() + eta * score, dim=0)


@dataclass
class Doge(Mixer):
    """Proportions by the alignment of gradients.

    Args:
        eta: step size of an update, > 0. With an update every n steps, n times the paper's keeps its pace.
        max_score: what scores are cut at, > 0.
        against: "others": the sum of the other domains' gradients; "eval": the gradient of the evaluation sets.
        probe_samples: samples of each domain, and of the target, that a gradient is taken on, >= 1.
    """

    eta: Annotated[float, Range(gt=0)] = 0.02
    max_score: Annotated[float, Range(gt=0)] = 5.0
    against: Against = "others"
    probe_samples: Annotated[int, Range(ge=1)] = 64
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _weights_sum: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _updates: int = field(default=0, init=False, repr=False)
    _alignment_scores: list[float] = field(default_factory=list, init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Start at the initial proportions."""
        self._weights = torch.tensor(domains.initial_proportions, dtype=torch.float64)
        self._weights /= self._weights.sum()
        self._weights_sum = torch.zeros_like(self._weights)

    def requests(self) -> tuple[Request, ...]:
        return (DomainGradientSignal(self.probe_samples, self.against == "eval"),)

    def receive(self, request: Request, value: Tensor, step: int) -> None:
        """One update with [m, m] inner products. Products that are not finite change nothing."""
        scores = alignment_scores(value.double(), len(self._weights), self.against, self.max_score)
        if bool(torch.isfinite(scores).all()):
            self._alignment_scores = scores.tolist()
            self._weights = exponentiated_gradient_step(self._weights, scores, self.eta)
        self._weights_sum, self._updates = self._weights_sum + self._weights, self._updates + 1

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64, sums to 1: the current domain weights."""
        return self._weights.clone()

    def average_weights(self) -> tuple[int, Tensor]:
        """(updates, mean weights); before any update, the initial proportions."""
        return self._updates, self._weights_sum / self._updates if self._updates else self._weights.clone()

    def report(self) -> dict[str, Any]:
        """The alignment scores of the last update; empty before it."""
        return {"scores": list(self._alignment_scores)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, their sum over the updates, the number of updates and the last scores."""
        tensors = {"weights": self._weights.tolist(), "weights_sum": self._weights_sum.tolist()}
        return {**tensors, "updates": self._updates, "scores": list(self._alignment_scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's doge weights are for {found}")
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._weights_sum = torch.tensor(state["weights_sum"], dtype=torch.float64)
        self._updates, self._alignment_scores = int(state["updates"]), list(state["scores"])
