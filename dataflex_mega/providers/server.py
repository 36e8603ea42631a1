"""Serves the requests of a run's algorithms: one provider per kind of request, called at the scope it is entered for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Algorithm, Selector
from dataflex_mega.providers.context import BatchScope, CandidateScope, PlanScope, SignalContext
from dataflex_mega.providers.registry import Provider, Scope, requests_at
from dataflex_mega.signals.pool_share import PoolShare
from dataflex_mega.types import SignalTable


@dataclass
class SignalServer:
    """Implements control.signal_source.SignalSource. Every rank calls each method at the same time."""

    context: SignalContext
    pool_share: PoolShare  # of the whole pool
    _providers: dict[type[Provider], Provider] = field(default_factory=dict, init=False)

    def _provider(self, kind: type[Provider]) -> Provider:
        if kind not in self._providers:
            self._providers[kind] = kind(self.context)
        return self._providers[kind]

    def signal_names(self, selector: Selector) -> list[str]:
        return sorted(request.name for request, _ in requests_at(selector, "candidates"))

    def table(self, selector: Selector, ids: np.ndarray | None, step: int) -> tuple[SignalTable, list[int]]:
        pool_share = self.pool_share if ids is None else self.pool_share.subset(ids)
        scope = CandidateScope(self.context, pool_share, pool_share.local_ids(), step)
        columns: dict[str, Tensor] = {}
        for request, entry in requests_at(selector, "candidates"):
            columns.update(self._provider(entry.provider).compute(request, scope))
        own_ids = torch.from_numpy(scope.ids)
        return SignalTable(own_ids, self.domain_ids(own_ids), columns), pool_share.rank_counts()

    def domain_ids(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.context.pool.locate(ids.numpy())[0].astype(np.int64))

    def before_update(self, algorithm: Algorithm, step: int) -> None:
        self._deliver(algorithm, "plan", PlanScope(step), step)

    def before_step(self, algorithm: Algorithm, step: int, ids: Callable[[], np.ndarray]) -> None:
        self._deliver(algorithm, "batch", BatchScope(step, ids), step)

    def _deliver(self, algorithm: Algorithm, scope: Scope, at: Any, step: int) -> None:
        for request, entry in requests_at(algorithm, scope):
            if algorithm.is_due(request, step):
                algorithm.receive(request, self._provider(entry.provider).compute(request, at), step)
