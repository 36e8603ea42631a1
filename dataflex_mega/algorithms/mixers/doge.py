"""DoGE: draw more of the domains whose gradient points where that of the target does.

Fan et al. 2023, "DoGE: Domain Reweighting with Generalization Estimation" (arXiv 2310.15393). With g_i the gradient of
domain i's mean token loss, taken at each update on a probe of its samples:

    alignment   W_i = <g_i, sum over j != i of g_j>          or <g_i, g_t> for a target t
    score       s_i = W_i / mean over j of |g_j|, cut to 0..max_score
    weights     w   ~ w exp(eta s)

The paper's proxy weighs the gradients of an even batch by w; here domains are drawn in w, which is the same in the mean. Its
eta is the learning rate over mu, 1e-3 / 0.05, at every step. The mean of w over the updates is what a larger model draws by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Mixer
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.types import Averages, Clock, NeedsGradients

Against = Literal["others", "eval"]
TINY = 1e-6  # of the official code: added to the mean length


def scores(gram: Tensor, domains: int, against: Against, most: float) -> Tensor:
    """Inner products of gradients, [k, k] or with the target last [k + 1, k + 1] float64 -> [k] scores in 0..most."""
    own = gram[:domains, :domains]
    aligned = gram[:domains, domains] if against == "eval" else own.sum(dim=1) - own.diagonal()
    return (aligned / (own.diagonal().clamp(min=0).sqrt().mean() + TINY)).clamp(min=0.0, max=most)


def updated_weights(weights: Tensor, score: Tensor, eta: float) -> Tensor:
    """[k] float64 after one update; sums to 1."""
    return torch.softmax(weights.log() + eta * score, dim=0)


@dataclass
class Doge(Mixer, NeedsGradients, Averages):
    """Proportions by the alignment of gradients.

    Args:
        eta: step size of an update, > 0. With an update every n steps, n times the paper's keeps its pace.
        max_score: what scores are cut at, > 0.
        against: "others": the sum of the other domains' gradients; "eval": the gradient of the evaluation sets.
        probe_samples: samples of each domain, and of the target, that a gradient is taken on, >= 1.
    """

    eta: float = 0.02
    max_score: float = 5.0
    against: Against = "others"
    probe_samples: int = 64
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _sum: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _updates: int = field(default=0, init=False, repr=False)
    _scores: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        rules = {
            "eta": (math.isfinite(self.eta) and self.eta > 0, "finite and > 0"),
            "max_score": (math.isfinite(self.max_score) and self.max_score > 0, "finite and > 0"),
            "probe_samples": (self.probe_samples >= 1, ">= 1"),
        }
        for key, (kept, rule) in rules.items():
            if not kept:
                raise ConfigError(f"mixer.doge.{key}: must be {rule}, found {getattr(self, key)}")

    def setup(self, domains: Domains) -> None:
        """Starts at the initial proportions."""
        self._weights = torch.tensor(domains.initial, dtype=torch.float64)
        self._weights /= self._weights.sum()
        self._sum = torch.zeros_like(self._weights)

    def learn(self, gram: Tensor) -> None:
        """One update; see types.NeedsGradients. Products that are not finite change nothing."""
        found = scores(gram.double(), len(self._weights), self.against, self.max_score)
        if bool(torch.isfinite(found).all()):
            self._scores = found.tolist()
            self._weights = updated_weights(self._weights, found, self.eta)
        self._sum, self._updates = self._sum + self._weights, self._updates + 1

    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64: the weights."""
        return self._weights.clone()

    def average_weights(self) -> tuple[int, Tensor]:
        """See types.Averages; before any update, the initial proportions."""
        return self._updates, self._sum / self._updates if self._updates else self._weights.clone()

    def report(self) -> dict[str, Any]:
        """The scores of the last update; empty before it."""
        return {"scores": list(self._scores)}

    def state(self) -> dict[str, Any]:
        """Weights, their sum and the number of updates."""
        tensors = {"weights": self._weights.tolist(), "sum": self._sum.tolist()}
        return {**tensors, "updates": self._updates, "scores": list(self._scores)}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's doge weights are for {found}")
        self._weights, self._sum = (torch.tensor(state[name], dtype=torch.float64) for name in ("weights", "sum"))
        self._updates, self._scores = int(state["updates"]), list(state["scores"])
