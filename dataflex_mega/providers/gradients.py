"""Gradient scores of candidates with the evaluation sets, exact and not stored; see signals.per_sample_gradients."""

from __future__ import annotations

from torch import Tensor

from dataflex_mega.algorithms.requests import GradientSignal
from dataflex_mega.engines.base import GradientScorer
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.providers.context import CandidateScope, SignalContext
from dataflex_mega.providers.registry import Provider, provides


@provides(GradientSignal, scope="candidates", requires={Capability.GRADIENT_SCORES}, needs_targets=True)
class GradientProvider(Provider):
    """Target directions by a backward pass per group, then candidates by activation gradients."""

    def __init__(self, context: SignalContext) -> None:
        super().__init__(context)
        self.reported: set[str] = set()

    def compute(self, request: GradientSignal, scope: CandidateScope) -> dict[str, Tensor]:
        scorer = gradient_scorer(self.context, request.adam, self.reported)
        groups = self.context.target_groups(request.task_boundaries)
        directions = scorer.directions(self.context.target_batches(groups))
        return scope.gradient_dots(scorer, directions)


def gradient_scorer(context: SignalContext, adam: bool, reported: set[str]) -> GradientScorer:
    """The engine's gradient scorer, with a line, once, about what it computes with."""
    scorer = context.engine.gradient_scorer(adam)
    message = scorer.kernel_message
    if message and message not in reported:
        reported.add(message)
        context.report(message)
    return scorer
