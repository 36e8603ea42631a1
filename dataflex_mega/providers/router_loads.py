"""Where a mixture of experts sends the tokens of each domain, counted in the training forward pass."""

from __future__ import annotations

from typing import Any

from dataflex_mega.algorithms.requests import RouterLoadSignal
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.providers.registry import Provider, provides


@provides(RouterLoadSignal, scope="forward", requires={Capability.ROUTER_LOADS}, pairs=True)
class RouterLoadProvider(Provider):
    """The engine's hooks count tokens; `StepStats.expert_load` has the sums."""

    @classmethod
    def step_options(cls, request: RouterLoadSignal) -> dict[str, Any]:
        return {"count_router_loads": True}
