"""DoReMi against golden numbers of its update, an independent simulation and its invariants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.algorithms.mixers.doremi import DoReMi
from dataflex_mega.errors import CheckpointError, ConfigError, TrainingFault
from dataflex_mega.types import StepStats
from tests.unit.algorithms.examples import DOMAINS, generator, softmax, stats, update_context

UNIFORM = DomainInfo(names=("a", "b", "c"), num_samples=(9, 9, 9), initial_proportions=(1 / 3, 1 / 3, 1 / 3))
GOLDEN = [  # eta 1, c 1e-3, one after the other from uniform weights
    ([0.5, 0.1, 0.0], [0.4390972793, 0.2944456018, 0.2664571189]),
    ([0.2, 0.2, 0.2], [0.4389915153, 0.2944844895, 0.2665239951]),
    ([0.0, 0.0, 1.0], [0.3011313798, 0.2021148167, 0.4967538035]),
]


def doremi(domains: DomainInfo = UNIFORM, **parameters: Any) -> DoReMi:
    mixer = DoReMi(**parameters)
    mixer.setup(domains)
    return mixer


def with_excess(excess: Mapping[int, float], domains: int = 3, loss: float = 7.0) -> StepStats:
    """A step whose token losses are `loss` and whose mean clipped excesses are these."""
    made = stats(dict.fromkeys(excess, loss), domains)
    sums = torch.tensor([excess.get(d, 0.0) for d in range(domains)], dtype=torch.float64) * 8
    return replace(made, domain_excess_loss=sums)


def feed(mixer: DoReMi, excess: Mapping[int, float], step: int = 1) -> None:
    mixer.observe(with_excess(excess), (1 / 3,) * 3, step)


def weights(mixer: DoReMi) -> list[float]:
    return mixer.step_loss_weights().weights.tolist()


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("with_initial", [0.3781383769, 0.2810945603, 0.3407670627]),
        ("iterates", [0.3930733915, 0.263681636, 0.3432449725]),
    ],
)
def test_golden_trajectory_and_both_averages(average: Any, expected: list[float]) -> None:
    mixer = doremi(average=average)
    for step, (excess, after) in enumerate(GOLDEN, 1):
        feed(mixer, dict(enumerate(excess)), step)
        assert weights(mixer) == pytest.approx(after, abs=5.1e-11)
    updates, mean = mixer.average_weights()
    assert updates == 3 and mean.tolist() == pytest.approx(expected, abs=5.1e-11)


def test_golden_update_of_given_excesses() -> None:
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    found = exponentiated_gradient_step(start, torch.tensor([0.25, 0.0, 2.0], dtype=torch.float64), 1.0, 1e-3)
    assert found.tolist() == pytest.approx([0.1329427184, 0.1036096262, 0.7634476554], abs=5.1e-11)


def test_golden_carry_over_of_an_absent_domain() -> None:
    mixer = doremi()
    mixer.load_state_dict({"weights": [1 / 3] * 3, "excess": [None, None, 1.0], "weights_sum": [0.0] * 3, "updates": 0})
    feed(mixer, {0: 0.4, 1: 0.2})
    assert weights(mixer) == pytest.approx([0.2747198427, 0.2249820068, 0.5002981506], abs=5.1e-11)


def test_trajectory_in_plain_python_with_domains_missing_now_and_then() -> None:
    mixer, w, last, total = doremi(DOMAINS, reweight_eta=0.3, reweight_eps=0.02), [1 / 3] * 3, [None] * 3, [0.0] * 3
    for t in range(1, 80):
        excess = {d: math.sin(t * (d + 1)) ** 2 for d in range(3) if (t + d) % 3 and (d < 2 or t > 10)}
        feed(mixer, excess, t)
        last = [excess.get(d, old) for d, old in enumerate(last)]
        there = [x for x in last if x is not None]
        full = [sum(there) / len(there) if x is None else x for x in last]
        shares = softmax([math.log(a) + 0.3 * b for a, b in zip(w, full, strict=True)])
        w = [0.98 * s + 0.02 / 3 for s in shares]
        total = [a + b for a, b in zip(total, w, strict=True)]
        assert weights(mixer) == pytest.approx(w, abs=1e-12)
    assert mixer.average_weights()[1].tolist() == pytest.approx([x / 79 for x in total], abs=1e-12)


def test_equal_excess_leaves_weights_uniform_and_a_constant_does_not_matter() -> None:
    even, plain, shifted = doremi(), doremi(), doremi()
    for step in range(1, 50):
        feed(even, {0: 0.7, 1: 0.7, 2: 0.7}, step)
        feed(plain, {0: 0.0, 1: 0.2, 2: 0.1}, step)
        feed(shifted, {0: 5.0, 1: 5.2, 2: 5.1}, step)
    assert weights(even) == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert weights(plain) == pytest.approx(weights(shifted), rel=1e-12)
    assert weights(plain)[1] > weights(plain)[2] > weights(plain)[0]


def test_fixed_excess_without_smoothing_multiplies_up() -> None:
    mixer = doremi(reweight_eta=0.05, reweight_eps=0.0)
    for step in range(1, 41):
        feed(mixer, {0: 2.0, 1: 3.0, 2: 4.0}, step)
    powers = [math.exp(0.05 * 40 * x) for x in (2, 3, 4)]
    assert weights(mixer) == pytest.approx([p / sum(powers) for p in powers], rel=1e-12)


def test_every_weight_keeps_its_part_of_the_smoothing() -> None:
    mixer = doremi(reweight_eta=5.0, reweight_eps=0.03)
    for step in range(1, 60):
        feed(mixer, {0: 900.0, 1: 1.0, 2: 0.0}, step)
    assert min(weights(mixer)) >= 0.01 - 1e-12 and sum(weights(mixer)) == pytest.approx(1, abs=1e-15)


def test_the_raw_loss_does_not_matter_and_the_drawn_proportions_stay() -> None:
    low, high = doremi(DOMAINS), doremi(DOMAINS)
    low.observe(with_excess({0: 0.1, 1: 0.3, 2: 0.2}, loss=1.0), DOMAINS.initial_proportions, 1)
    high.observe(with_excess({0: 0.1, 1: 0.3, 2: 0.2}, loss=9.0), DOMAINS.initial_proportions, 1)
    assert weights(low) == weights(high) != [1 / 3] * 3
    assert low.proportions(update_context(), generator()).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_a_step_without_a_reference_is_a_fault_and_one_that_is_not_finite_changes_nothing() -> None:
    mixer = doremi()
    with pytest.raises(TrainingFault, match="step 4: doremi was given no reference losses"):
        mixer.observe(replace(stats({0: 1.0}), domain_excess_loss=None), (1 / 3,) * 3, 4)
    feed(mixer, {0: math.nan, 1: math.inf})
    assert weights(mixer) == [1 / 3] * 3 and mixer.report()["perdomain_scores"] == [None] * 3


def test_before_the_first_step_the_average_is_uniform() -> None:
    assert doremi().average_weights()[1].tolist() == pytest.approx([1 / 3] * 3)


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        doremi(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(doremi().state_dict())


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"reweight_eta": 0.0}, "reweight_eta"),
        ({"reweight_eta": math.inf}, "reweight_eta"),
        ({"reweight_eps": 1.0}, "reweight_eps"),
        ({"reweight_eps": -0.1}, "reweight_eps"),
        ({"reweight_eps": math.nan}, "reweight_eps"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.doremi\.{key}: must be .*found"):
        DoReMi(**parameters)
