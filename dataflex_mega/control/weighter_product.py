"""Several weighters at once: the product of their weights, scaled to mean 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Weighter
from dataflex_mega.algorithms.requests import Request
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.weight_checks import reduced, weights_of
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import SampleStats


@dataclass
class ProductWeighter(Weighter):
    """The product of the weights of `members`, each starting after its own warm-up."""

    members: Sequence[tuple[Weighter, UpdateSchedule]] = ()

    def setup(self, domains: DomainInfo) -> None:
        for weighter, _ in self.members:
            weighter.setup(domains)

    def requests(self) -> tuple[Request, ...]:
        return tuple(request for weighter, _ in self.members for request in weighter.requests())

    def is_due(self, request: Request, step: int) -> bool:
        return self._asker(request).is_due(request, step)

    def receive(self, request: Request, value: Any, step: int) -> None:
        self._asker(request).receive(request, value, step)

    def _asker(self, request: Request) -> Weighter:
        """The member that makes a request; `combine_weighters` lets one member make requests of a kind."""
        return next(weighter for weighter, _ in self.members if request in weighter.requests())

    def reduce(self, samples: SampleStats) -> SampleStats:
        for weighter, _ in self.members:
            samples = reduced(weighter, samples)
        return samples

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. All 1 where the product is 0 for every sample."""
        product = torch.ones_like(samples.loss_sum, dtype=torch.float64)
        for weighter, schedule in self.members:
            if not schedule.in_warmup(step):
                product = product * weights_of(weighter, samples, step, total_steps).double()
        total = product.sum()
        return torch.where(total > 0, product * (len(product) / total), 1.0).float()

    def state_dict(self) -> dict[str, Any]:
        """The state of every member, by its position."""
        return {str(number): weighter.state_dict() for number, (weighter, _) in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, (weighter, _) in enumerate(self.members):
            weighter.load_state_dict(state[str(number)])


def combine_weighters(members: Sequence[tuple[Weighter, UpdateSchedule]]) -> Weighter:
    """One weighter that stands for all. Raises ConfigError for weighters that have no product."""
    if len(members) == 1:
        return members[0][0]
    askers: dict[type[Request], Weighter] = {}
    for weighter, _ in members:
        reasons = [request.excluded_from_products for request in weighter.requests()]
        reason = "chooses tokens" if weighter.token_selection() is not None else next(filter(None, reasons), "")
        if reason:
            raise ConfigError(f"pipeline.stages: weighter {_name(weighter)} {reason} and cannot be one of several")
        for kind in dict.fromkeys(type(request) for request in weighter.requests()):
            other = askers.setdefault(kind, weighter)
            if other is not weighter:
                names = f"{_name(other)} and {_name(weighter)}"
                raise ConfigError(f"pipeline.stages: weighters {names} both request {kind.__name__}; keep one of them")
    return ProductWeighter(tuple(members))


def _name(weighter: Weighter) -> str:
    return type(weighter).__name__.lower()
