"""Loss weights against golden numbers, an independent formula and the paper's invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.weighters.loss import LossWeighter, weights_from_losses
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import SampleStats
from tests.unit.algorithms.examples import observed, softmax

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
STRATEGIES = ["linupper", "uniform", "quadratic", "extremes"]
GOLDEN = [
    ("linupper", 1.0, [0.1236814792, 0.2039162856, 0.3362011176, 0.3362011176]),
    ("linupper", 0.5, [0.0540645922, 0.1469627985, 0.3994863047, 0.3994863047]),
    ("quadratic", 1.0, [0.1462997463, 0.3097165654, 0.3976839419, 0.1462997463]),
    ("extremes", 1.0, [0.3362011176, 0.2039162856, 0.1236814792, 0.3362011176]),
]
PREFERENCE = {
    "linupper": lambda h, d: min(h + d, d),
    "quadratic": lambda h, d: 1 - h * h / (d * d),
    "extremes": lambda h, d: abs(h),
    "uniform": lambda h, d: 0.0,
}


def published(losses: list[float], strategy: str, delta: float, r: float) -> list[float]:
    """The published form, in plain Python, with mean 1 in place of sum 1."""
    low, high = min(losses), max(losses)
    h = [2 * delta * x / (high - low) - delta * (high + low) / (high - low) for x in losses]
    return [len(losses) * s for s in softmax([PREFERENCE[strategy](x, delta) / r for x in h])]


@pytest.mark.parametrize(("strategy", "r", "expected"), GOLDEN)
def test_golden_weights(strategy: Any, r: float, expected: list[float]) -> None:
    assert weights_from_losses(LOSSES.float(), strategy, 1.0, r).dtype == torch.float64
    assert (weights_from_losses(LOSSES, strategy, 1.0, r) / 4).tolist() == pytest.approx(expected, abs=5.1e-11)
    found = LossWeighter(strategy=strategy, r=r).weights(observed(LOSSES), 0, 10)
    assert found.dtype == torch.float32
    assert (found / 4).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("delta", "r"), [(1.0, 1.0), (2.5, 0.7), (0.3, 4.0)])
def test_published_formula(strategy: Any, delta: float, r: float) -> None:
    losses = (torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6).tolist()
    found = weights_from_losses(torch.tensor(losses, dtype=torch.float64), strategy, delta, r)
    assert found.tolist() == pytest.approx(published(losses, strategy, delta, r), rel=1e-12)


def test_uniform_is_exactly_one() -> None:
    assert LossWeighter(strategy="uniform").weights(observed([0.1, 7.0, 3.0]), 0, 10).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scaled_and_shifted_losses_weigh_the_same(strategy: Any) -> None:
    found = weights_from_losses(LOSSES * 3.7 + 11, strategy)
    assert found.tolist() == pytest.approx(weights_from_losses(LOSSES, strategy).tolist(), rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_and_a_hot_softmax_are_uniform(strategy: Any) -> None:
    assert weights_from_losses(torch.full((5,), 2.3), strategy).tolist() == pytest.approx([1.0] * 5, abs=1e-15)
    assert weights_from_losses(LOSSES, strategy, 1.0, 1e9).tolist() == pytest.approx([1.0] * 4, abs=1e-8)


def test_nearly_equal_losses_do_not_cancel() -> None:
    """In float32, with a range of 3e-6 around 10, the published form is noise; from the minimum it is exact."""
    tight = torch.tensor([10.0, 10.0 + 2**-20, 10.0 + 2**-19, 10.0 + 2**-18], dtype=torch.float32)
    expected = weights_from_losses(torch.tensor([0.0, 1.0, 2.0, 4.0]), "linupper")
    assert weights_from_losses(tight, "linupper").tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_linupper_bounds_the_largest_weight() -> None:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    for r in (0.5, 1.0, 3.0):
        assert float(weights_from_losses(losses, "linupper", 1.0, r).max()) <= math.exp(1 / r)


def test_a_sample_without_tokens_weighs_one_and_changes_nothing_else() -> None:
    samples = observed(LOSSES)
    blank = SampleStats(
        torch.arange(5),
        torch.zeros(5, dtype=torch.int64),
        torch.cat([torch.zeros(1), samples.loss_sum]),
        torch.cat([torch.zeros(1, dtype=torch.int64), samples.num_tokens]),
    )
    found = LossWeighter().weights(blank, 0, 10)
    assert float(found[0]) == 1.0
    assert torch.equal(found[1:], LossWeighter().weights(samples, 0, 10))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_that_is_not_finite_spoils_no_other_weight(strategy: Any) -> None:
    spoilt = torch.tensor([math.nan, 1.0, 2.0, math.inf, 3.0, 5.0], dtype=torch.float64)
    found = weights_from_losses(spoilt, strategy)
    assert found[[0, 3]].tolist() == [1.0, 1.0]
    assert found[[1, 2, 4, 5]].tolist() == pytest.approx(weights_from_losses(LOSSES, strategy).tolist(), rel=1e-15)
    assert weights_from_losses(torch.full((2,), math.nan), strategy).tolist() == [1.0, 1.0]
    assert weights_from_losses(torch.zeros(0), strategy).shape == (0,)


def test_the_temperature_moves_linearly_to_its_end() -> None:
    weighter = LossWeighter(r=1.0, r_start=100.0, anneal_steps=10)
    assert [weighter.temperature(step) for step in (0, 5, 10, 50)] == [100.0, 50.5, 1.0, 1.0]
    assert [LossWeighter(r=0.5).temperature(step) for step in (0, 99)] == [0.5, 0.5]
    spread = [float(weighter.weights(observed(LOSSES), step, 100).std()) for step in range(11)]
    assert spread == sorted(spread) and spread[0] < 0.01 < 0.3 < spread[-1]
    assert torch.equal(weighter.weights(observed(LOSSES), 10, 100), LossWeighter().weights(observed(LOSSES), 0, 100))


def test_weights_carry_no_gradient() -> None:
    losses = LOSSES.float().requires_grad_()
    samples = SampleStats(torch.arange(4), torch.zeros(4, dtype=torch.int64), losses * 2, torch.full((4,), 2))
    assert not LossWeighter().weights(samples, 0, 10).requires_grad


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"delta": 0.0}, "delta"),
        ({"r": -1.0}, "r"),
        ({"r": math.nan}, "r"),
        ({"r_start": 0.0, "anneal_steps": 5}, "r_start"),
        ({"r_start": 10.0}, "anneal_steps"),
        ({"anneal_steps": 10}, "anneal_steps"),
        ({"r_start": 10.0, "anneal_steps": -3}, "anneal_steps"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"weighter\.loss\.{key}: .*found"):
        LossWeighter(**parameters)
