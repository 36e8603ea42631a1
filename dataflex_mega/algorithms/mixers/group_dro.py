"""Group DRO: the domains with the highest loss get more weight, by exponentiated gradient ascent.

Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts" (arXiv 1911.08731), with the smoothing of
DoReMi (Xie et al. 2023, arXiv 2305.10429), whose update this is without a reference model. After every step, with L_d the
mean token loss of domain d in it:

    w <- (1 - c) softmax(log w + eta L) + c / k

A domain without tokens in a step keeps its last L_d; until its first it counts with the mean of the others. The weights
start at the initial proportions p. They act on the loss, where a sample of domain d weighs w_d / p_d while the domains are
drawn in p, or on the proportions themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import StepStats, UpdateContext


def relative_weights(weights: Tensor, proportions: Tensor) -> Tensor:
    """[k] loss weights: weights / proportions, divided by their sum; 0 for a domain that is never drawn."""
    ratio = torch.where(proportions > 0, weights / proportions, 0.0)
    return ratio / ratio.sum()


@dataclass
class GroupDro(Mixer):
    """Weights of the worst domains.

    With act_on "loss" the weights take effect at the next update and hold until the one after it: `update_step: 1` gives the
    algorithm as published. They are updated after every step in any case, from the first on.

    Args:
        eta: step size of the ascent, > 0; the logarithm of a weight grows by eta times the loss. Group DRO's is 0.01;
            DoReMi's of 1 is for excess losses, which are smaller.
        smoothing: c, the fraction that is spread evenly, 0 <= smoothing < 1.
        act_on: "loss": the initial proportions are drawn and the loss is weighted; "sampling": the weights are the
            proportions and the loss is not weighted.
    """

    eta: Annotated[float, Range(gt=0)] = 0.01
    smoothing: Annotated[float, Range(ge=0, lt=1)] = 1e-3
    act_on: Literal["loss", "sampling"] = "loss"
    _initial: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _losses: list[float | None] = field(default_factory=list, init=False, repr=False)  # [k], None before the first

    def setup(self, domains: DomainInfo) -> None:
        """Start at the initial proportions."""
        self._initial = torch.tensor(domains.initial_proportions, dtype=torch.float64)
        self._initial /= self._initial.sum()
        self._weights = self._initial.clone()
        self._losses = [None] * len(domains)

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """One step of the ascent. A domain whose loss is not finite is treated as one without tokens."""
        means = (stats.domain_loss.double() / stats.domain_tokens.double()).tolist()
        self._losses = [new if math.isfinite(new) else old for new, old in zip(means, self._losses, strict=True)]
        known_losses = [loss for loss in self._losses if loss is not None]
        if not known_losses:
            return
        mean_known = sum(known_losses) / len(known_losses)
        losses = torch.tensor([mean_known if x is None else x for x in self._losses], dtype=torch.float64)
        self._weights = exponentiated_gradient_step(self._weights, losses, self.eta, self.smoothing)

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions, or the weights when they act on sampling."""
        return (self._weights if self.act_on == "sampling" else self._initial).clone()

    def loss_weights(self) -> Tensor | None:
        """[k] float64, sums to 1: w_d / p_d, relative to each other; None when the weights act on sampling."""
        return None if self.act_on == "sampling" else relative_weights(self._weights, self._initial)

    def report(self) -> dict[str, Any]:
        """The weights, and the losses of their last update under DataFlex's name for them."""
        return {"group_weights": self._weights.tolist(), "perdomain_scores": list(self._losses)}

    def state_dict(self) -> dict[str, Any]:
        """Weights and last losses, by domain."""
        return {"weights": self._weights.tolist(), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's group_dro weights are for {found}")
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._losses = list(state["losses"])
