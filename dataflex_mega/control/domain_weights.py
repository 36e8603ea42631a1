"""How the domain weights of a mixer change the weights of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import DomainLossNorm, SampleStats, SamplingPlan


def uniform_weights(samples: SampleStats) -> Tensor:
    """Weight 1 for each of n samples, [n]."""
    return torch.ones_like(samples.loss_sum)


def scale_keeping_sum(weights: Tensor, factors: Tensor) -> Tensor:
    """[n] weights times [n] factors, scaled to the sum of the factors alone.

    So a weighter changes weights within the samples that it compares and no domain's share of the step, and the mean of a
    step stays 1.
    """
    product = weights * factors
    total = product.sum()
    return torch.where(total > 0, product * (factors.sum() / total), factors)


def domain_loss_factors(plan: SamplingPlan) -> Tensor | None:
    """[k] factors of the loss from a mixer's domain weights, with mean 1 over the samples that the plan draws."""
    if plan.domain_loss_weights is None:
        return None
    weights, proportions = torch.tensor(plan.domain_loss_weights).double(), torch.tensor(plan.proportions).double()
    return weights / (weights * proportions).sum()


@dataclass(frozen=True)
class PerStepDomainFactors:
    """Weighs samples by domain with weights of this very step: DoReMi's loss; see types.StepLossWeights.

    With c_d the step's token count of domain d (sample count where samples count the same) and C their sum, the factor of
    domain d is C v_d / sum over domains of v c, where v_d is w_d / p_d, or w_d / c_d. The factors have mean 1 over the
    step's tokens exactly, so the step's denominator stays C. Domains without tokens take no part.
    """

    weights: Tensor  # [k] float64, sums to 1
    proportions: Tensor  # [k] float64, of the plan
    loss_norm: DomainLossNorm

    def __call__(self, samples: SampleStats) -> Tensor:
        """Samples -> [n] float32 factors. Raises TrainingFault when the engine gave no denominators of the step."""
        if samples.step_denominators is None:
            raise TrainingFault(
                "domain weights of a step need SampleStats.step_denominators, which the engine did not give"
            )
        counts = samples.step_denominators.double()
        weights, proportions = self.weights.to(counts), self.proportions.to(counts)
        divisors = proportions if self.loss_norm == "token" else counts
        ratio = torch.where((divisors > 0) & (counts > 0), weights / divisors, 0.0)
        total = (ratio * counts).sum()
        factors = torch.where(total > 0, ratio * (counts.sum() / total), 1.0)
        return factors.to(samples.loss_sum)[samples.domain_ids]
