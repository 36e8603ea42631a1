"""Several weighters at once: the product of their weights, scaled to mean 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Weighter
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import HiddenSpec, NeedsBatchGradients, NeedsHidden, NeedsReference, SampleObs, TokenChoice


class When(Protocol):
    """What is needed of schedule.Schedule."""

    def warming(self, step: int) -> bool: ...


@dataclass
class Product(Weighter):
    """The product of the weights of `parts`, each from the end of its own warm-up on."""

    parts: Sequence[tuple[Weighter, When]] = ()

    def setup(self, domains: Domains) -> None:
        """See Algorithm."""
        for part, _ in self.parts:
            part.setup(domains)

    def weights(self, obs: SampleObs, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. All 1 where the product is 0 for every sample."""
        product = torch.ones_like(obs.loss_sum, dtype=torch.float64)
        for part, when in self.parts:
            if not when.warming(step):
                product = product * part.weights(obs, step, total_steps).double()
        total = product.sum()
        return torch.where(total > 0, product * (len(product) / total), 1.0).float()

    def state(self) -> dict[str, Any]:
        """Of each part, in their order."""
        return {str(number): part.state() for number, (part, _) in enumerate(self.parts)}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for number, (part, _) in enumerate(self.parts):
            part.restore(state[str(number)])


@dataclass
class HiddenProduct(NeedsHidden, Product):
    """With one part, the first, that compares hidden states."""

    @property
    def _comparing(self) -> Any:
        return self.parts[0][0]

    @property
    def hidden(self) -> HiddenSpec:
        """That part's."""
        return self._comparing.hidden

    @property
    def target_samples(self) -> int:
        """That part's."""
        return self._comparing.target_samples

    def stale(self, step: int) -> bool:
        """That part's."""
        return self._comparing.stale(step)

    def learn(self, target: Tensor, step: int) -> None:
        """That part's."""
        self._comparing.learn(target, step)

    def compare(self, hidden: Tensor) -> Tensor:
        """That part's."""
        return self._comparing.compare(hidden)


def multiplied(parts: Sequence[tuple[Weighter, When]]) -> Weighter:
    """One weighter for all. Raises ConfigError for those that cannot be multiplied."""
    if len(parts) == 1:
        return parts[0][0]
    for part, _ in parts:
        if isinstance(part, TokenChoice | NeedsReference):
            raise ConfigError(f"pipeline.stages: weighter {_name(part)} chooses tokens and cannot be one of several")
        if isinstance(part, NeedsBatchGradients):
            raise ConfigError(f"pipeline.stages: weighter {_name(part)} chooses samples and cannot be one of several")
    comparing = [pair for pair in parts if isinstance(pair[0], NeedsHidden)]
    if len(comparing) > 1:
        names = " and ".join(_name(part) for part, _ in comparing)
        raise ConfigError(f"pipeline.stages: weighters {names} both compare hidden states; keep one of them")
    others = [pair for pair in parts if pair not in comparing]
    return HiddenProduct((*comparing, *others)) if comparing else Product(tuple(parts))


def _name(part: Weighter) -> str:
    return type(part).__name__.lower()
