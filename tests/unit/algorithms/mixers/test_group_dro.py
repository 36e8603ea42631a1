"""Group DRO against golden numbers of its update, an independent simulation and its invariants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.algorithms.mixers.group_dro import GroupDro, relative_weights
from dataflex_mega.errors import CheckpointError, ConfigError
from tests.unit.algorithms.examples import DOMAINS, generator, softmax, stats, update_context

UNIFORM = DomainInfo(names=("a", "b", "c"), num_samples=(9, 9, 9), initial_proportions=(1 / 3, 1 / 3, 1 / 3))
GOLDEN = [  # eta 1, c 1e-3, one after the other from uniform weights
    ([0.5, 0.1, 0.0], [0.4390972793, 0.2944456018, 0.2664571189]),
    ([0.2, 0.2, 0.2], [0.4389915153, 0.2944844895, 0.2665239951]),
    ([0.0, 0.0, 1.0], [0.3011313798, 0.2021148167, 0.4967538035]),
]


def dro(domains: DomainInfo = UNIFORM, **parameters: Any) -> GroupDro:
    mixer = GroupDro(**parameters)
    mixer.setup(domains)
    return mixer


def weights(mixer: GroupDro) -> list[float]:
    return mixer.report()["group_weights"]


def feed(mixer: GroupDro, losses: dict[int, float], step: int = 1) -> None:
    mixer.observe(stats(losses), (1 / 3, 1 / 3, 1 / 3), step)


@pytest.mark.parametrize("act_on", ["loss", "sampling"])
def test_golden_trajectory(act_on: Any) -> None:
    mixer = dro(eta=1.0, act_on=act_on)
    for step, (losses, expected) in enumerate(GOLDEN, 1):
        feed(mixer, dict(enumerate(losses)), step)
        assert weights(mixer) == pytest.approx(expected, abs=5.1e-11)


def test_golden_update_of_given_losses() -> None:
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    found = exponentiated_gradient_step(start, torch.tensor([0.25, 0.0, 2.0], dtype=torch.float64), 1.0, 1e-3)
    assert found.tolist() == pytest.approx([0.1329427184, 0.1036096262, 0.7634476554], abs=5.1e-11)


def test_golden_loss_weights() -> None:
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    golden = [0.5555555556, 0.3333333333, 0.1111111111]
    assert relative_weights(w, p).tolist() == pytest.approx(golden, abs=5.1e-11)


def test_golden_carry_over_of_an_absent_domain() -> None:
    mixer = dro(eta=1.0)
    mixer.load_state_dict({"weights": [1 / 3, 1 / 3, 1 / 3], "losses": [None, None, 1.0]})
    feed(mixer, {0: 0.4, 1: 0.2})
    assert weights(mixer) == pytest.approx([0.2747198427, 0.2249820068, 0.5002981506], abs=5.1e-11)
    assert mixer.report()["perdomain_scores"] == pytest.approx([0.4, 0.2, 1.0])


def test_trajectory_in_plain_python_with_domains_missing_now_and_then() -> None:
    mixer, w, last = dro(DOMAINS, eta=0.3, smoothing=0.02), [0.5, 0.3, 0.2], [None, None, None]
    for t in range(1, 80):
        losses = {d: 1 + math.sin(t * (d + 1)) ** 2 for d in range(3) if (t + d) % 3 and (d < 2 or t > 10)}
        feed(mixer, losses, t)
        last = [losses.get(d, old) for d, old in enumerate(last)]
        there = [x for x in last if x is not None]
        full = [sum(there) / len(there) if x is None else x for x in last]
        shares = softmax([math.log(a) + 0.3 * b for a, b in zip(w, full, strict=True)])
        w = [0.98 * s + 0.02 / 3 for s in shares]
        assert weights(mixer) == pytest.approx(w, abs=1e-12)


def test_fixed_losses_without_smoothing_multiply_up() -> None:
    mixer = dro(DOMAINS, eta=0.05, smoothing=0.0)
    for step in range(1, 41):
        feed(mixer, {0: 2.0, 1: 3.0, 2: 4.0}, step)
    powers = [p * math.exp(0.05 * 40 * x) for p, x in zip((0.5, 0.3, 0.2), (2, 3, 4), strict=True)]
    assert weights(mixer) == pytest.approx([p / sum(powers) for p in powers], rel=1e-12)


def test_equal_losses_change_nothing_and_a_constant_on_all_losses_does_not_matter() -> None:
    even, plain, shifted = dro(), dro(), dro()
    for step in range(1, 50):
        feed(even, {0: 2.0, 1: 2.0, 2: 2.0}, step)
        feed(plain, {0: 1.0, 1: 3.0, 2: 2.0}, step)
        feed(shifted, {0: 8.0, 1: 10.0, 2: 9.0}, step)
    assert weights(even) == pytest.approx([1 / 3] * 3, abs=1e-15)
    assert weights(plain) == pytest.approx(weights(shifted), rel=1e-12)
    assert weights(plain)[1] > weights(plain)[2] > weights(plain)[0]


def test_every_weight_keeps_its_part_of_the_smoothing() -> None:
    mixer = dro(eta=5.0, smoothing=0.03)
    for step in range(1, 60):
        feed(mixer, {0: 900.0, 1: 1.0, 2: 0.0}, step)
    assert min(weights(mixer)) >= 0.01 - 1e-12 and sum(weights(mixer)) == pytest.approx(1, abs=1e-15)


def test_acting_on_the_loss_draws_the_initial_proportions() -> None:
    mixer = dro(DOMAINS, eta=0.5)
    first = mixer.loss_weights()
    assert first is not None and first.tolist() == pytest.approx([1 / 3] * 3)
    feed(mixer, {0: 1.0, 1: 1.0, 2: 3.0})
    found, w = mixer.loss_weights(), weights(mixer)
    ratios = [a / b for a, b in zip(w, (0.5, 0.3, 0.2), strict=True)]
    assert found is not None and found.tolist() == pytest.approx([r / sum(ratios) for r in ratios])
    assert mixer.proportions(update_context(), generator()).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_acting_on_sampling_draws_the_weights_and_leaves_the_loss() -> None:
    mixer = dro(DOMAINS, eta=0.5, act_on="sampling")
    feed(mixer, {0: 1.0, 1: 1.0, 2: 3.0})
    assert mixer.proportions(update_context(), generator()).tolist() == weights(mixer)
    assert mixer.loss_weights() is None


def test_a_domain_that_is_never_drawn_has_no_weight_in_the_loss() -> None:
    mixer = dro(DomainInfo(("a", "b"), (5, 5), (1.0, 0.0)))
    mixer.observe(stats({0: 2.0}, domains=2), (1.0, 0.0), 1)
    found = mixer.loss_weights()
    assert found is not None and found.tolist() == [1.0, 0.0]


def test_a_step_without_a_finite_loss_changes_nothing() -> None:
    mixer = dro(DOMAINS)
    feed(mixer, {0: math.nan, 2: math.inf})
    assert weights(mixer) == [0.5, 0.3, 0.2]
    assert mixer.report()["perdomain_scores"] == [None, None, None]


def test_state_of_other_domains_is_refused() -> None:
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        dro(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(dro().state_dict())


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"eta": 0.0}, "eta"),
        ({"eta": math.inf}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"smoothing": math.nan}, "smoothing"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.group_dro\.{key}: must be .*found"):
        GroupDro(**parameters)
