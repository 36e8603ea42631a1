"""Serves the requests of a run's algorithms: one provider per kind of request, called at the scope it is entered for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Algorithm, Selector
from dataflex_mega.algorithms.requests import Request
from dataflex_mega.errors import TrainingFault, UserCall
from dataflex_mega.providers.context import BatchScope, CandidateScope, PlanScope, SignalContext
from dataflex_mega.providers.registry import Provider, Scope, display_name, requests_at
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
            columns.update(self._columns(self._provider(entry.provider), request, scope))
        own_ids = torch.from_numpy(scope.ids)
        return SignalTable(own_ids, self.domain_ids(own_ids), columns), pool_share.rank_counts()

    @staticmethod
    def _columns(provider: Provider, request: Request, scope: CandidateScope) -> dict[str, Tensor]:
        """What a provider computes of this rank's candidates. Raises TrainingFault unless a column has a row for each."""
        who = f"provider {type(provider).__name__}.compute"
        with _blame(provider, who):
            columns = provider.compute(request, scope)
        if not isinstance(columns, dict):
            raise TrainingFault(f"{who} returned a {type(columns).__name__}, a dict of columns by name was expected")
        for name, column in columns.items():
            if not isinstance(column, Tensor) or column.dim() == 0 or len(column) != len(scope.ids):
                found = list(column.shape) if isinstance(column, Tensor) else f"a {type(column).__name__}"
                expected = f"a tensor with {len(scope.ids)} rows was expected, one for each candidate"
                raise TrainingFault(f"{who} returned {found} as column {name!r}; {expected}")
        return columns

    def domain_ids(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.context.pool.locate(ids.numpy())[0].astype(np.int64))

    def before_update(self, algorithm: Algorithm, step: int) -> None:
        self._deliver(algorithm, "plan", PlanScope(step), step)

    def before_step(self, algorithm: Algorithm, step: int, ids: Callable[[], np.ndarray]) -> None:
        self._deliver(algorithm, "batch", BatchScope(step, ids), step)

    def _deliver(self, algorithm: Algorithm, scope: Scope, at: Any, step: int) -> None:
        for request, entry in requests_at(algorithm, scope):
            who = f"{algorithm.role} {display_name(algorithm)}"
            with UserCall(f"{who}.is_due"):
                due = algorithm.is_due(request, step)
            if due:
                provider = self._provider(entry.provider)
                with _blame(provider, f"provider {type(provider).__name__}.compute"):
                    value = provider.compute(request, at)
                with UserCall(f"{who}.receive"):
                    algorithm.receive(request, value, step)


def _blame(provider: Provider, who: str) -> AbstractContextManager[None]:
    """Names a provider that is not of this package when it raises; what goes wrong in ours is not its caller's affair."""
    return nullcontext() if type(provider).__module__.startswith("dataflex_mega.") else UserCall(who)
