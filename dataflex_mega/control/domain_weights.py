"""What the domain weights of a mixer make of the weights of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex_mega.errors import TrainingFault
from dataflex_mega.types import LossNorm, Plan, SampleObs


def all_alike(obs: SampleObs) -> Tensor:
    """[n] ones."""
    return torch.ones_like(obs.loss_sum)


def product(weights: Tensor, factors: Tensor) -> Tensor:
    """[n] weights times [n] factors, with the sum that the factors have alone: what a weighter does within the samples it
    compares changes no domain's part of the step, and the mean of a step stays 1."""
    both = weights * factors
    total = both.sum()
    return torch.where(total > 0, both * (factors.sum() / total), factors)


def domain_factors(plan: Plan) -> Tensor | None:
    """[k] factors of the loss from a mixer's domain weights, with mean 1 over what the plan draws."""
    if plan.loss_weights is None:
        return None
    weights, shares = torch.tensor(plan.loss_weights).double(), torch.tensor(plan.proportions).double()
    return weights / (weights * shares).sum()


@dataclass(frozen=True)
class StepFactors:
    """Weighs samples by domain with weights of this very step: DoReMi's loss; see types.StepWeighing.

    With c_d the step's token count of domain d (sample count where samples count the same) and C their sum, the factor of
    domain d is C v_d / sum over domains of v c, where v_d is w_d / p_d, or w_d / c_d. The factors have mean 1 over the
    step's tokens exactly, so the step's denominator stays C. Domains without tokens take no part.
    """

    weights: Tensor  # [k] float64, sums to 1
    proportions: Tensor  # [k] float64, of the plan
    loss_norm: LossNorm

    def __call__(self, obs: SampleObs) -> Tensor:
        """Samples -> [n] float32 factors. Raises TrainingFault when the engine does not say how many tokens the step has."""
        if obs.step_count is None:
            raise TrainingFault("domain weights of a step need SampleObs.step_count, which the engine did not give")
        counts = obs.step_count.double()
        weights, proportions = self.weights.to(counts), self.proportions.to(counts)
        shares = proportions if self.loss_norm == "token" else counts
        ratio = torch.where((shares > 0) & (counts > 0), weights / shares, 0.0)
        total = (ratio * counts).sum()
        factors = torch.where(total > 0, ratio * (counts.sum() / total), 1.0)
        return factors.to(obs.loss_sum)[obs.domain]
