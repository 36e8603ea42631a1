"""Inner products of the gradients of domains, for mixers that learn from their alignment."""

from __future__ import annotations

from torch import Tensor

from dataflex_mega.algorithms.requests import DomainGradientSignal
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.providers.context import PlanScope
from dataflex_mega.providers.registry import Provider, provides
from dataflex_mega.signals.gradient_gram import DomainGradientGram


@provides(
    DomainGradientSignal,
    scope="plan",
    requires={Capability.DOMAIN_GRADIENTS},
    needs_targets=lambda request: request.against_targets,
)
class DomainGradientProvider(Provider):
    """A backward pass over a probe of each domain, and the Gram matrix of what it gives."""

    def compute(self, request: DomainGradientSignal, scope: PlanScope) -> Tensor:
        c = self.context
        targets, gram = list(c.evaluation.values()), c.engine.gradient_gram
        compute = DomainGradientGram(
            c.pool, targets, c.collate, gram, c.batch_size, c.parallel_info.dp_rank, c.parallel_info.dp_size, c.seed
        )
        return compute(request.probe_samples, request.against_targets, scope.step)
