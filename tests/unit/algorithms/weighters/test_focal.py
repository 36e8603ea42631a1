"""Focal weights against golden factors, an independent formula and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from dataflex_mega.algorithms.weighters.focal import Focal, focal_factor
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import SampleStats
from tests.unit.algorithms.examples import observed

PROBABILITIES = [0.9, 0.5, 0.1]
LOSSES = [-math.log(p) for p in PROBABILITIES]


def test_golden_factors() -> None:
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    assert (focal_factor(losses, 2.0) * losses).tolist() == pytest.approx([0.00105, 0.17329, 1.86509], abs=5.1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_weights_are_the_factors_over_their_mean(gamma: float) -> None:
    factors = [(1 - p) ** gamma for p in PROBABILITIES]
    expected = [3 * f / sum(factors) for f in factors]
    assert Focal(gamma).weights(observed(LOSSES), 0, 10).tolist() == pytest.approx(expected, rel=1e-6)


def test_gamma_zero_is_uniform_even_for_a_certain_sample() -> None:
    assert Focal(0.0).weights(observed([0.0, 0.1, 9.0]), 0, 10).tolist() == [1.0, 1.0, 1.0]


def test_a_larger_gamma_favours_the_badly_predicted_more() -> None:
    shares = [float(Focal(g).weights(observed(LOSSES), 0, 10)[2]) for g in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert shares == sorted(shares) and shares[-1] > 2.9


def test_losses_near_zero_keep_their_ratio() -> None:
    """1 - exp(-x) is x here: it would be 0 in float32, and the square of it underflows float64."""
    tiny = Focal(2.0).weights(observed([1e-30, 2e-30]), 0, 10)
    assert tiny.tolist() == pytest.approx([0.4, 1.6], rel=1e-5)


def test_all_predicted_with_certainty_weigh_the_same() -> None:
    assert Focal(2.0).weights(observed([0.0, 0.0]), 0, 10).tolist() == [1.0, 1.0]
    assert Focal(2.0).weights(observed([]), 0, 10).shape == (0,)


def test_a_sample_without_a_loss_weighs_one_and_changes_nothing_else() -> None:
    samples = observed([math.nan, *LOSSES, math.inf, 0.0])
    tokens = samples.num_tokens.clone()
    tokens[-1] = 0
    found = Focal().weights(SampleStats(samples.sample_ids, samples.domain_ids, samples.loss_sum, tokens), 0, 10)
    assert found[[0, 4, 5]].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(found[1:4], Focal().weights(observed(LOSSES), 0, 10))


def test_weights_carry_no_gradient() -> None:
    samples = observed(LOSSES)
    traced = SampleStats(samples.sample_ids, samples.domain_ids, samples.loss_sum.requires_grad_(), samples.num_tokens)
    assert not Focal().weights(traced, 0, 10).requires_grad


@pytest.mark.parametrize("wrong", [-0.1, math.inf, math.nan])
def test_a_wrong_gamma_is_refused(wrong: float) -> None:
    with pytest.raises(
        ConfigError, match=r"weighter\.focal\.gamma: (must be (finite and )?>= 0|expected a number), found"
    ):
        Focal(wrong)
