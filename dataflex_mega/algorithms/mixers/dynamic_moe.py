"""Dynamic mixing for mixtures of experts: draw more of the domains that use the experts unlike the others do.

Zhu et al. 2024, "Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts" (arXiv 2406.11256). With O_i the
share of domain i's tokens that each expert gets, a vector that sums to 1:

    distance   D_i = mean over j of |O_i - O_j|        (l2), or 1 - mean over j of cos(O_i, O_j)        (cos); j = i too
    weights    w  <- (1 - c) softmax(log w + eta D) + c / k

The published code measures O on a few held-out batches. Here the routers are counted in the forward passes of training
itself, over `count_steps` steps, which costs no pass and counts every token of every rank. Nothing pulls the weights
back: loads that stay apart drive them towards one domain, and c alone keeps the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Mixer
from dataflex_mega.errors import CheckpointError, ConfigError, TrainingFault
from dataflex_mega.types import Clock, NeedsLoads, StepStats

Similarity = Literal["l2", "cos"]


def distances(loads: Tensor, similarity: Similarity) -> Tensor:
    """[k, E] float64 loads, rows sum to 1 -> [k] how far a domain is from all domains in the mean."""
    if similarity == "l2":
        return (loads.unsqueeze(0) - loads.unsqueeze(1)).norm(dim=2).mean(dim=1)
    unit = loads / loads.norm(dim=1, keepdim=True)
    return 1 - (unit @ unit.T).mean(dim=1)


def updated_weights(weights: Tensor, distance: Tensor, eta: float, smoothing: float) -> Tensor:
    """[k] float64 after one update; sums to 1, each at least smoothing / k."""
    mixed = (1 - smoothing) * torch.softmax(weights.log() + eta * distance, dim=0) + smoothing / len(weights)
    return mixed / mixed.sum()


@dataclass
class DynamicMoe(Mixer, NeedsLoads):
    """Proportions by how differently domains use the experts.

    A domain without tokens in a window keeps its loads of the last one; until its first it counts as far as the others do
    in the mean.

    Args:
        eta: step size, > 0; the logarithm of a weight grows by eta times the distance.
        c: the share that is spread evenly, 0 <= c < 1.
        similarity: "l2" or "cos": how loads are compared.
        layers: "last": the last layer with experts, as in the paper; "all": the mean of the distances of all of them.
        count_steps: steps whose tokens are counted for one update, >= 1.
    """

    eta: float = 10.0
    c: float = 0.05
    similarity: Similarity = "l2"
    layers: Literal["last", "all"] = "last"
    count_steps: int = 100
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _counts: Tensor | None = field(default=None, init=False, repr=False)  # [L, k, E] of the window
    _loads: Tensor | None = field(default=None, init=False, repr=False)  # [L, k, E], each [E] sums to 1, or 0: unknown
    _distance: list[float] = field(default_factory=list, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)  # of the window

    def __post_init__(self) -> None:
        rules = {
            "eta": (math.isfinite(self.eta) and self.eta > 0, "finite and > 0"),
            "c": (0 <= self.c < 1, ">= 0 and < 1"),
            "count_steps": (self.count_steps >= 1, ">= 1"),
        }
        for key, (kept, rule) in rules.items():
            if not kept:
                raise ConfigError(f"mixer.dynamic_moe.{key}: must be {rule}, found {getattr(self, key)}")

    def setup(self, domains: Domains) -> None:
        """Starts at the initial proportions."""
        self._weights = torch.tensor(domains.initial, dtype=torch.float64)
        self._weights /= self._weights.sum()

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Add a step's counts; the last of a window moves the weights. Raises TrainingFault without counts."""
        if stats.expert_load is None:
            raise TrainingFault("mixer dynamic_moe needs the routers' counts, which the engine did not give")
        counts = stats.expert_load.double().cpu()
        self._counts = counts if self._counts is None else self._counts + counts
        self._steps += 1
        if self._steps == self.count_steps:
            self._update(self._counts)
            self._counts, self._steps = None, 0

    def _update(self, counts: Tensor) -> None:
        total = counts.sum(dim=2, keepdim=True)
        before = torch.zeros_like(counts) if self._loads is None else self._loads
        self._loads = torch.where(total > 0, counts / total.clamp(min=1), before)
        sparse = self._loads.sum(dim=(1, 2)).nonzero().flatten()  # layers with experts
        known = self._loads[sparse].sum(dim=(0, 2)) > 0 if len(sparse) else torch.zeros(counts.shape[1]).bool()
        if not bool(known.any()):
            return
        used = sparse if self.layers == "all" else sparse[-1:]
        each = torch.stack([distances(self._loads[layer][known], self.similarity) for layer in used.tolist()]).mean(0)
        distance = torch.full_like(self._weights, float(each.mean()))
        distance[known] = each
        self._distance = distance.tolist()
        self._weights = updated_weights(self._weights, distance, self.eta, self.c)

    def proportions(self, clock: Clock, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions until the first window is full, then the weights."""
        return self._weights.clone()

    def report(self) -> dict[str, Any]:
        """The distances of the last update; empty before it."""
        return {"distances": list(self._distance)}

    def state(self) -> dict[str, Any]:
        """Weights, the window's counts and the last loads."""
        tensors = {"counts": self._counts, "loads": self._loads}
        lists = {name: None if value is None else value.tolist() for name, value in tensors.items()}
        return {"weights": self._weights.tolist(), "distance": list(self._distance), "steps": self._steps, **lists}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's dynamic_moe weights are for {found}")
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._distance, self._steps = list(state["distance"]), int(state["steps"])
        counts, loads = (
            None if state[name] is None else torch.tensor(state[name], dtype=torch.float64)
            for name in ("counts", "loads")
        )
        self._counts, self._loads = counts, loads
