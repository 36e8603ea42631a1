"""ODM against golden trajectories, an independent formula in plain Python, and its own invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers.odm import Odm, bandit_policy, exploration_rate, updated_rewards
from dataflex_mega.errors import CheckpointError, ConfigError
from tests.unit.algorithms.examples import DOMAINS, generator, softmax, stats, update_context

UNIFORM = DomainInfo(names=("a", "b", "c"), num_samples=(9, 9, 9), initial_proportions=(1 / 3, 1 / 3, 1 / 3))
ARMS = [(0, 2.0, 4), (1, 3.0, 5), (2, 1.0, 6), (0, 2.5, 100), (1, 3.0, 101)]  # arm, loss, t; alpha 0.9
GOLDEN = {
    "paper": [
        [0.3375614304, 0.3312192848, 0.3312192848],
        [0.3348115173, 0.3410322346, 0.3241562481],
        [0.3330351275, 0.3404524412, 0.3265124313],
        [0.3643404676, 0.3367789755, 0.2988805569],
        [0.3363017136, 0.3433280402, 0.3203702462],
    ],
    "exp3": [
        [0.3375614304, 0.3312192848, 0.3312192848],
        [0.3348115173, 0.3410322346, 0.3241562481],
        [0.3330351275, 0.3404524412, 0.3265124313],
        [0.3671776252, 0.3352559296, 0.2975664452],
        [0.336419399, 0.3440427461, 0.319537855],
    ],
    "smoothed_mean": [
        [0.3385726709, 0.3307136645, 0.3307136645],
        [0.3281905279, 0.3551507674, 0.3166587047],
        [0.3256972776, 0.3579441398, 0.3163585826],
        [0.3633069945, 0.3728258142, 0.2638671913],
        [0.3305240363, 0.3640669125, 0.3054090512],
    ],
}
GROUP = [
    ([2.0, 3.0, 1.0], 4, [0.3251570532, 0.3639611073, 0.3108818395]),
    ([2.0, 3.0, 1.0], 5, [0.3166659819, 0.3957680672, 0.287565951]),
    ([2.5, 2.8, 1.0], 100, [0.3053137458, 0.5615089459, 0.1331773083]),
    ([2.5, 2.8, 1.0], 10_000, [0.3257159681, 0.5816621992, 0.0926218327]),
]


def odm(domains: DomainInfo = UNIFORM, **parameters: Any) -> Odm:
    mixer = Odm(**parameters)
    mixer.setup(domains)
    return mixer


def shares(mixer: Odm) -> list[float]:
    return mixer.proportions(update_context(), generator()).tolist()


def play(mixer: Odm, arms: list[tuple[int, float, int]]) -> list[list[float]]:
    """One sampled domain a step, each step drawn with the policy of the step before."""
    current, found = shares(mixer), []
    for arm, loss, t in arms:
        mixer.observe(stats({arm: loss}), tuple(current), t)
        current = shares(mixer)
        found.append(current)
    return found


@pytest.mark.parametrize("variant", sorted(GOLDEN))
def test_golden_trajectory(variant: Any) -> None:
    for found, expected in zip(play(odm(variant=variant), ARMS), GOLDEN[variant], strict=True):
        assert found == pytest.approx(expected, abs=5.1e-11)


@pytest.mark.parametrize("variant", sorted(GOLDEN))
def test_golden_trajectory_of_the_bare_functions(variant: Any) -> None:
    rewards, current, before = torch.zeros(3).double(), torch.ones(3).double() / 3, 0
    for (arm, loss, t), expected in zip(ARMS, GOLDEN[variant], strict=True):
        losses = torch.full((3,), math.nan).double()
        losses[arm] = loss
        rewards = updated_rewards(rewards, losses, current, variant, 0.9)
        current = bandit_policy(rewards, exploration_rate(3, t), exploration_rate(3, before), variant)
        before = t
        assert current.tolist() == pytest.approx(expected, abs=5.1e-11)


def test_golden_trajectory_of_the_group_rule() -> None:
    mixer = odm(variant="group")
    for losses, t, expected in GROUP:
        mixer.observe(stats(dict(enumerate(losses))), tuple(shares(mixer)), t)
        assert shares(mixer) == pytest.approx(expected, abs=5.1e-11)


def test_golden_exploration_rates() -> None:
    golden = {4: 0.3025739977, 5: 0.2706304108, 10: 0.1913645987, 100: 0.0605147995, 1000: 0.0191364599}
    assert {t: round(exploration_rate(3, t), 10) for t in golden} == golden
    first_below = {k: next(t for t in range(1, 99) if exploration_rate(k, t) < 1 / k) for k in (2, 3, 7, 22)}
    assert first_below == {2: 2, 3: 4, 7: 14, 22: 69}


@pytest.mark.parametrize("importance", ["inclusion", "proportion"])
def test_paper_rule_in_plain_python_with_several_domains_a_step(importance: Any) -> None:
    mixer, rewards, before = odm(importance=importance), [0.0, 0.0, 0.0], 1 / 3
    for t in range(1, 60):
        drawn_with = tuple(shares(mixer))
        losses = {d: 1 + math.sin(t * (d + 1)) ** 2 for d in range(3) if (t + d) % 3}
        step = stats(losses, tokens=5.0 + t)
        mixer.observe(step, drawn_with, t)
        draws = float(step.domain_samples.sum()) if len(losses) > 1 and importance == "inclusion" else 1
        seen = [1 - (1 - p) ** draws for p in drawn_with]
        rewards = [0.9 * r + 0.1 * losses[d] / seen[d] if d in losses else r for d, r in enumerate(rewards)]
        rate = min(1 / 3, math.sqrt(math.log(3) / (3 * t)))
        expected = [(1 - 3 * rate) * s + rate for s in softmax([before * r for r in rewards])]
        assert shares(mixer) == pytest.approx(expected, abs=1e-12)
        before = rate


@pytest.mark.parametrize("variant", ["paper", "exp3", "smoothed_mean", "group"])
def test_shares_sum_to_one_and_keep_the_exploration_rate(variant: Any) -> None:
    mixer = odm(variant=variant)
    for t in range(1, 300):
        mixer.observe(stats({t % 3: 0.5 + t % 7}), tuple(shares(mixer)), t)
        found = shares(mixer)
        assert sum(found) == pytest.approx(1, abs=1e-14)
        assert min(found) >= exploration_rate(3, t) - 1e-15


def test_a_mixed_step_rewards_a_rare_domain_for_its_loss_and_not_for_its_rarity() -> None:
    """Equal losses, unequal proportions, every domain in every step: nothing tells the domains apart."""
    fair, swinging = odm(DOMAINS), odm(DOMAINS, importance="proportion")
    step = replace(stats({0: 2.0, 1: 2.0, 2: 2.0}), domain_samples=torch.tensor([320.0, 190.0, 130.0]))
    for mixer in (fair, swinging):
        mixer.observe(step, (0.5, 0.3, 0.2), 50)
    assert fair.report()["estimated_rewards"] == pytest.approx([0.2] * 3)
    assert swinging.report()["estimated_rewards"] == pytest.approx([0.4, 0.2 / 0.3, 1.0])


@pytest.mark.parametrize("variant", ["paper", "exp3", "smoothed_mean", "group"])
def test_equal_losses_stay_uniform_and_a_higher_loss_is_drawn_more(variant: Any) -> None:
    even, uneven = odm(variant=variant), odm(variant=variant)
    for t in range(1, 50):
        even.observe(stats({0: 2.0, 1: 2.0, 2: 2.0}), (1 / 3, 1 / 3, 1 / 3), t)
        uneven.observe(stats({0: 1.0, 1: 3.0, 2: 2.0}), (1 / 3, 1 / 3, 1 / 3), t)
    assert shares(even) == pytest.approx([1 / 3] * 3, abs=1e-12)
    assert shares(uneven)[1] > shares(uneven)[2] > shares(uneven)[0]


def test_adding_a_constant_to_all_rewards_matters_to_the_linear_rule_only() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0]).double()
    for variant, same in (("paper", True), ("exp3", True), ("smoothed_mean", True), ("group", False)):
        found = bandit_policy(rewards, 0.1, 0.2, variant), bandit_policy(rewards + 5, 0.1, 0.2, variant)
        assert torch.allclose(*found, atol=1e-14) == same


def test_the_loss_of_a_domain_is_its_token_mean() -> None:
    few, many, two = odm(importance="proportion"), odm(importance="proportion"), torch.tensor([1.0, 1.0, 0.0])
    few.observe(replace(stats({0: 2.0, 1: 3.0}, tokens=1.0), domain_samples=two), (0.5, 0.3, 0.2), 7)
    many.observe(replace(stats({0: 2.0, 1: 3.0}, tokens=4096.0), domain_samples=two), (0.5, 0.3, 0.2), 7)
    assert shares(few) == shares(many)
    assert few.report()["estimated_rewards"] == pytest.approx([0.1 * 2 / 0.5, 0.1 * 3 / 0.3, 0.0])


def test_a_domain_that_was_not_drawn_or_is_not_finite_keeps_its_reward() -> None:
    mixer = odm()
    mixer.observe(stats({0: 2.0, 1: 3.0, 2: 1.0}), (0.5, 0.3, 0.2), 7)
    before = mixer.report()["estimated_rewards"]
    mixer.observe(stats({1: math.nan, 2: 1.0}), (0.5, 0.5, 0.0), 8)  # 2 came from a plan before this mixture
    assert mixer.report()["estimated_rewards"] == before


@pytest.mark.parametrize("variant", ["paper", "exp3", "smoothed_mean", "group"])
def test_huge_losses_do_not_overflow(variant: Any) -> None:
    mixer = odm(variant=variant)
    for t in range(1, 30):
        mixer.observe(stats({0: 1e4, 1: 1e3, 2: 1.0}), (1 / 3, 1 / 3, 1 / 3), t)
    found = shares(mixer)
    assert all(math.isfinite(x) for x in found) and sum(found) == pytest.approx(1)
    assert found[0] >= found[2]


def test_warm_up_draws_the_initial_proportions_and_learns_nothing() -> None:
    mixer = odm(DOMAINS, warmup_steps=5)
    for t in range(1, 6):
        mixer.observe(stats({0: 9.0}), (0.5, 0.3, 0.2), t)
        assert shares(mixer) == pytest.approx([0.5, 0.3, 0.2])
    assert mixer.report()["estimated_rewards"] == [0.0, 0.0, 0.0]
    mixer.observe(stats({0: 9.0}), (0.5, 0.3, 0.2), 6)
    rate = exploration_rate(3, 6)  # t counts the warm-up too
    expected = [(1 - 3 * rate) * s + rate for s in softmax([0.1 * 9 / 0.5 / 3, 0, 0])]
    assert shares(mixer) == pytest.approx(expected)


def test_given_initial_proportions_come_first() -> None:
    assert shares(odm(DOMAINS, initial_proportions=[2.0, 1.0, 1.0])) == [0.5, 0.25, 0.25]
    assert shares(odm(DOMAINS)) == pytest.approx([0.5, 0.3, 0.2])


def test_reward_scale_multiplies_losses_and_the_floor_holds_the_rate() -> None:
    scaled, plain = odm(reward_scale=15.0), odm()
    scaled.observe(stats({0: 2.0}), (1 / 3, 1 / 3, 1 / 3), 4)
    plain.observe(stats({0: 30.0}), (1 / 3, 1 / 3, 1 / 3), 4)
    assert shares(scaled) == shares(plain)
    floored = odm(min_exploration_rate=0.25)
    for t in range(1, 1000):
        floored.observe(stats({0: 50.0, 1: 1.0, 2: 1.0}), (1 / 3, 1 / 3, 1 / 3), t)
    assert min(shares(floored)) >= 0.25 - 1e-15
    assert floored.report()["exploration_rate"] == 0.25


def test_report_has_the_fields_of_dataflex() -> None:
    mixer = odm(alpha=0.8)
    mixer.observe(stats({0: 2.0}), (1 / 3, 1 / 3, 1 / 3), 100)
    report = mixer.report()
    assert report == {
        "estimated_rewards": pytest.approx([0.2 * 2 * 3, 0, 0]),
        "exploration_rate": pytest.approx(0.0605147995),
        "alpha": 0.8,
    }


def test_state_of_other_domains_is_refused() -> None:
    state = odm().state_dict()
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        odm(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(state)


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"reward_scale": math.inf}, "reward_scale"),
        ({"min_exploration_rate": -0.1}, "min_exploration_rate"),
        ({"min_exploration_rate": 0.34}, "min_exploration_rate"),
        ({"initial_proportions": [0.5, 0.5]}, "initial_proportions"),
        ({"initial_proportions": [0.5, -0.5, 1.0]}, "initial_proportions"),
        ({"initial_proportions": [0.0, 0.0, 0.0]}, "initial_proportions"),
        ({"initial_proportions": [math.nan, 0.5, 0.5]}, "initial_proportions"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.odm\.{key}: .*"):
        odm(**parameters)
