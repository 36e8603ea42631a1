"""DoReMi's proxy run: domain weights by how far the proxy lags behind a reference model, Group DRO on excess losses.

Xie et al. 2023, "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining" (arXiv 2305.10429), algorithm 1,
and the authors' code where the two differ. After every step, with T_d target tokens of domain d in it over all ranks and
micro-batches, l the proxy's token losses and r the reference's:

    e_d = sum over tokens t of d of max(l_t - r_t, 0), divided by T_d
    w <- (1 - c) softmax(log w + eta e) + c / k

The excess is clipped token by token. A domain without tokens in a step keeps its last e_d, as in the authors' code; until
its first it counts with the mean of the others, where theirs counts it with the logarithm of the vocabulary's size. The
weights act on the loss of the very next step while the domains are drawn in the proportions that the run starts with.
Their mean over the steps is the result: the proportions of a third run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.algorithms.requests import ReferenceLossSignal, Request
from dataflex_mega.errors import CheckpointError, TrainingFault
from dataflex_mega.types import StepLossWeights, StepStats, UpdateContext


@dataclass
class DoReMi(Mixer):
    """Domain weights of the loss from excess losses, moved after every step.

    `warmup_step` keeps the loss unweighted for so long; the weights are updated from the first step on.

    Args:
        reweight_eta: step size of the ascent, > 0; the logarithm of a weight grows by eta times the excess loss.
        reweight_eps: c, the fraction that is spread evenly after every step, 0 <= c < 1.
        loss_norm: "token", as in the authors' code: the mean over tokens weighted by weight over drawn proportion;
            "per_domain", as in the paper: the weighted mean of the domains' token means.
        average: "iterates", as in the paper: the mean of the weights after each step; "with_initial", as in the authors'
            code: the weights before the first step count as one more.
    """

    reweight_eta: Annotated[float, Range(gt=0)] = 1.0
    reweight_eps: Annotated[float, Range(ge=0, lt=1)] = 1e-3
    loss_norm: Literal["token", "per_domain"] = "token"
    average: Literal["iterates", "with_initial"] = "iterates"
    _initial: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _excess: list[float | None] = field(default_factory=list, init=False, repr=False)  # [k], None before the first
    _weights_sum: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64), init=False, repr=False)
    _updates: int = field(default=0, init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Start with uniform weights whatever the drawn proportions are."""
        k = len(domains)
        self._initial = torch.tensor(domains.initial_proportions, dtype=torch.float64)
        self._initial /= self._initial.sum()
        self._weights = torch.full((k,), 1 / k, dtype=torch.float64)
        self._excess = [None] * k
        self._weights_sum = torch.zeros(k, dtype=torch.float64)
        self._updates = 0

    def requests(self) -> tuple[Request, ...]:
        return (ReferenceLossSignal(),)

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """One step of the ascent. Raises TrainingFault when the step was taken without reference losses."""
        if stats.domain_excess_loss is None:
            raise TrainingFault(f"step {step}: doremi was given no reference losses by the engine")
        means = (stats.domain_excess_loss.double() / stats.domain_tokens.double()).tolist()
        self._excess = [new if math.isfinite(new) else old for new, old in zip(means, self._excess, strict=True)]
        known_excess = [excess for excess in self._excess if excess is not None]
        if known_excess:
            mean_known = sum(known_excess) / len(known_excess)
            excess = torch.tensor([mean_known if x is None else x for x in self._excess], dtype=torch.float64)
            self._weights = exponentiated_gradient_step(self._weights, excess, self.reweight_eta, self.reweight_eps)
        self._weights_sum = self._weights_sum + self._weights
        self._updates += 1

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: always the proportions that the run starts with."""
        return self._initial.clone()

    def loss_weights(self) -> Tensor:
        """[k] float64, the current weights, for the plan: they mark its steps as weighted; see `step_loss_weights`."""
        return self._weights.clone()

    def step_loss_weights(self) -> StepLossWeights:
        return StepLossWeights(self._weights.clone(), self.loss_norm)

    def average_weights(self) -> tuple[int, Tensor]:
        """(steps, [k] float64 that sums to 1). Before the first step, uniform."""
        k = len(self._weights)
        extra = 1 if self.average == "with_initial" or self._updates == 0 else 0
        mean = (self._weights_sum + extra / k) / (self._updates + extra)
        return self._updates, mean / mean.sum()

    def report(self) -> dict[str, Any]:
        """The weights, the excess losses of their last update, and their mean so far; DataFlex's names for the first two."""
        return {
            "domain_weights": self._weights.tolist(),
            "perdomain_scores": list(self._excess),
            "average_weights": self.average_weights()[1].tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights, last excess losses, the sum of the weights after each step, and their number."""
        return {
            "weights": self._weights.tolist(),
            "excess": list(self._excess),
            "weights_sum": self._weights_sum.tolist(),
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's doremi weights are for {found}")
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._excess = list(state["excess"])
        self._weights_sum = torch.tensor(state["weights_sum"], dtype=torch.float64)
        self._updates = int(state["updates"])
