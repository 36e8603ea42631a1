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

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Range
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.algorithms.requests import Request, RouterLoadSignal
from dataflex_mega.errors import CheckpointError, TrainingFault
from dataflex_mega.types import StepStats, UpdateContext

Similarity = Literal["l2", "cos"]


def distances(loads: Tensor, similarity: Similarity) -> Tensor:
    """[k, E] float64 loads, rows sum to 1 -> [k] mean distance of each domain from all domains."""
    if similarity == "l2":
        return (loads.unsqueeze(0) - loads.unsqueeze(1)).norm(dim=2).mean(dim=1)
    unit = loads / loads.norm(dim=1, keepdim=True)
    return 1 - (unit @ unit.T).mean(dim=1)


@dataclass
class DynamicMoe(Mixer):
    """Proportions by how differently domains use the experts.

    A domain without tokens in a window keeps its loads of the last one; until its first it counts with the mean distance of
    the others.

    Args:
        eta: step size, > 0; the logarithm of a weight grows by eta times the distance.
        c: the fraction that is spread evenly, 0 <= c < 1.
        similarity: "l2" or "cos": how loads are compared.
        layers: "last": the last layer with experts, as in the paper; "all": the mean of the distances of all of them.
        count_steps: steps whose tokens are counted for one update, >= 1.
    """

    eta: Annotated[float, Range(gt=0)] = 10.0
    c: Annotated[float, Range(ge=0, lt=1)] = 0.05
    similarity: Similarity = "l2"
    layers: Literal["last", "all"] = "last"
    count_steps: Annotated[int, Range(ge=1)] = 100
    _weights: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.float64), init=False, repr=False)
    _token_counts: Tensor | None = field(default=None, init=False, repr=False)  # [L, k, E] of the window
    _loads: Tensor | None = field(default=None, init=False, repr=False)  # [L, k, E], each [E] sums to 1, or 0: unknown
    _distances: list[float] = field(default_factory=list, init=False, repr=False)
    _window_steps: int = field(default=0, init=False, repr=False)

    def setup(self, domains: DomainInfo) -> None:
        """Start at the initial proportions."""
        self._weights = torch.tensor(domains.initial_proportions, dtype=torch.float64)
        self._weights /= self._weights.sum()

    def requests(self) -> tuple[Request, ...]:
        return (RouterLoadSignal(),)

    def observe(self, stats: StepStats, proportions: tuple[float, ...], step: int) -> None:
        """Add a step's counts; the last step of a window updates the weights. Raises TrainingFault without counts."""
        if stats.expert_load is None:
            raise TrainingFault("mixer dynamic_moe needs the routers' counts, which the engine did not give")
        counts = stats.expert_load.double().cpu()
        self._token_counts = counts if self._token_counts is None else self._token_counts + counts
        self._window_steps += 1
        if self._window_steps == self.count_steps:
            self._update(self._token_counts)
            self._token_counts, self._window_steps = None, 0

    def _update(self, counts: Tensor) -> None:
        total = counts.sum(dim=2, keepdim=True)
        old_loads = torch.zeros_like(counts) if self._loads is None else self._loads
        self._loads = torch.where(total > 0, counts / total.clamp(min=1), old_loads)
        moe_layers = self._loads.sum(dim=(1, 2)).nonzero().flatten()
        known = self._loads[moe_layers].sum(dim=(0, 2)) > 0 if len(moe_layers) else torch.zeros(counts.shape[1]).bool()
        if not bool(known.any()):
            return
        layers = moe_layers if self.layers == "all" else moe_layers[-1:]
        per_layer = [distances(self._loads[layer][known], self.similarity) for layer in layers.tolist()]
        known_distances = torch.stack(per_layer).mean(0)
        all_distances = torch.full_like(self._weights, float(known_distances.mean()))
        all_distances[known] = known_distances
        self._distances = all_distances.tolist()
        self._weights = exponentiated_gradient_step(self._weights, all_distances, self.eta, self.c)

    def proportions(self, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[k] float64: the initial proportions until the first window is full, then the weights."""
        return self._weights.clone()

    def report(self) -> dict[str, Any]:
        """The distances of the last update; empty before it."""
        return {"distances": list(self._distances)}

    def state_dict(self) -> dict[str, Any]:
        """Weights, last distances, the window's counts, and the last loads."""
        tensors = {"token_counts": self._token_counts, "loads": self._loads}
        lists = {name: None if value is None else value.tolist() for name, value in tensors.items()}
        return {
            "weights": self._weights.tolist(),
            "distances": list(self._distances),
            "window_steps": self._window_steps,
            **lists,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the state is of another number of domains."""
        if len(state["weights"]) != len(self._weights):
            found = f"{len(state['weights'])} domains, this run has {len(self._weights)}"
            raise CheckpointError(f"the checkpoint's dynamic_moe weights are for {found}")
        self._weights = torch.tensor(state["weights"], dtype=torch.float64)
        self._distances, self._window_steps = list(state["distances"]), int(state["window_steps"])
        counts, loads = (
            None if state[name] is None else torch.tensor(state[name], dtype=torch.float64)
            for name in ("token_counts", "loads")
        )
        self._token_counts, self._loads = counts, loads
