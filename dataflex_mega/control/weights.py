"""The function that weighs the samples of a step: the product of a weighter's weights and a mixer's domain weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Mixer
from dataflex_mega.control import contracts
from dataflex_mega.control.domain_weights import (
    PerStepDomainFactors,
    domain_loss_factors,
    scale_keeping_sum,
    uniform_weights,
)
from dataflex_mega.control.weight_checks import CheckedWeighter, token_selection
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.types import SampleStats, TokenWeightFn, TrainState, WeightFn


def build_weight_fn(
    weighter: CheckedWeighter | None, mixer: Mixer | None, state: TrainState, total_steps: int, collectives: Collectives
) -> WeightFn | None:
    """The weights of the next step, or None when all samples weigh the same. `weighter`: None where none is active."""
    weight_fn = _sample_weight_fn(weighter, mixer, state, total_steps, collectives)
    selection = None if weighter is None else token_selection(weighter.weighter)
    return weight_fn if selection is None else TokenWeightFn(weight_fn or uniform_weights, selection)


def _sample_weight_fn(
    weighter: CheckedWeighter | None, mixer: Mixer | None, state: TrainState, total_steps: int, collectives: Collectives
) -> WeightFn | None:
    per_step = None if mixer is None else contracts.step_loss_weights(mixer, len(state.plan.proportions))
    factors: Tensor | WeightFn | None = domain_loss_factors(state.plan)
    if per_step is not None and state.plan.domain_loss_weights is not None:
        proportions = torch.tensor(state.plan.proportions).double()
        factors = PerStepDomainFactors(per_step.weights, proportions, per_step.loss_norm)
        if weighter is None:
            return factors
    if weighter is None and factors is None:
        return None
    return CombinedWeights(weighter, factors, state.step, total_steps, collectives)


@dataclass(frozen=True)
class CombinedWeights:
    """A WeightFn: gathers the samples of all ranks, weighs them alike everywhere, and returns this rank's rows."""

    weighter: CheckedWeighter | None
    domain_loss_factors: Tensor | WeightFn | None  # [k] factors, or a function of samples
    step: int
    total_steps: int
    collectives: Collectives

    def __call__(self, samples: SampleStats) -> Tensor:
        if self.weighter is not None:
            samples = self.weighter.reduce(samples)
        rows = {name: self.collectives.all_gather(local) for name, local in samples.gathered_fields().items()}
        gathered = SampleStats(**rows)
        weights = torch.ones_like(gathered.loss_sum)
        if isinstance(self.domain_loss_factors, Tensor):
            weights = self.domain_loss_factors.to(weights)[gathered.domain_ids]
        elif self.domain_loss_factors is not None:
            weights = self.domain_loss_factors(replace(gathered, step_denominators=samples.step_denominators))
        if self.weighter is not None:
            of_weighter = self.weighter.weights(gathered, self.step, self.total_steps).to(weights)
            weights = of_weighter if self.domain_loss_factors is None else scale_keeping_sum(of_weighter, weights)
        return self.collectives.local_rows(weights, len(samples.sample_ids))
