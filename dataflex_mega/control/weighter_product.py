"""Several weighters at once: the product of their weights, scaled to mean 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Weighter
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import (
    EmbeddingSpec,
    NeedsBatchGradients,
    NeedsHidden,
    NeedsReference,
    SampleStats,
    TokenChoice,
)


@dataclass
class ProductWeighter(Weighter):
    """The product of the weights of `members`, each starting after its own warm-up."""

    members: Sequence[tuple[Weighter, UpdateSchedule]] = ()

    def setup(self, domains: DomainInfo) -> None:
        for weighter, _ in self.members:
            weighter.setup(domains)

    def weights(self, samples: SampleStats, step: int, total_steps: int) -> Tensor:
        """[n] float32, mean 1. All 1 where the product is 0 for every sample."""
        product = torch.ones_like(samples.loss_sum, dtype=torch.float64)
        for weighter, schedule in self.members:
            if not schedule.in_warmup(step):
                product = product * weighter.weights(samples, step, total_steps).double()
        total = product.sum()
        return torch.where(total > 0, product * (len(product) / total), 1.0).float()

    def state_dict(self) -> dict[str, Any]:
        """The state of every member, by its position."""
        return {str(number): weighter.state_dict() for number, (weighter, _) in enumerate(self.members)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, (weighter, _) in enumerate(self.members):
            weighter.load_state_dict(state[str(number)])


@dataclass
class EmbeddingProductWeighter(NeedsHidden, ProductWeighter):
    """A product whose first member compares hidden states; requests for embeddings go to that member."""

    @property
    def _embedding_weighter(self) -> Any:
        return self.members[0][0]

    @property
    def hidden(self) -> EmbeddingSpec:
        return self._embedding_weighter.hidden

    @property
    def target_samples(self) -> int:
        return self._embedding_weighter.target_samples

    def stale(self, step: int) -> bool:
        return self._embedding_weighter.stale(step)

    def learn(self, target: Tensor, step: int) -> None:
        self._embedding_weighter.learn(target, step)

    def compare(self, hidden: Tensor) -> Tensor:
        return self._embedding_weighter.compare(hidden)


def combine_weighters(members: Sequence[tuple[Weighter, UpdateSchedule]]) -> Weighter:
    """One weighter that stands for all. Raises ConfigError for weighters that have no product."""
    if len(members) == 1:
        return members[0][0]
    for weighter, _ in members:
        if isinstance(weighter, TokenChoice | NeedsReference):
            raise ConfigError(
                f"pipeline.stages: weighter {_name(weighter)} chooses tokens and cannot be one of several"
            )
        if isinstance(weighter, NeedsBatchGradients):
            raise ConfigError(
                f"pipeline.stages: weighter {_name(weighter)} chooses samples and cannot be one of several"
            )
    with_embeddings = [member for member in members if isinstance(member[0], NeedsHidden)]
    if len(with_embeddings) > 1:
        names = " and ".join(_name(weighter) for weighter, _ in with_embeddings)
        raise ConfigError(f"pipeline.stages: weighters {names} both compare hidden states; keep one of them")
    others = [member for member in members if member not in with_embeddings]
    return EmbeddingProductWeighter((*with_embeddings, *others)) if with_embeddings else ProductWeighter(tuple(members))


def _name(weighter: Weighter) -> str:
    return type(weighter).__name__.lower()
