"""Dynamic MoE mixing: golden weights, a simulation in plain Python, and what its formula promises."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.mixers._updates import exponentiated_gradient_step
from dataflex_mega.algorithms.mixers.dynamic_moe import DynamicMoe, distances
from dataflex_mega.errors import CheckpointError, ConfigError, TrainingFault
from dataflex_mega.types import StepStats
from tests.unit.algorithms.examples import DOMAINS, generator, stats, update_context

LOADS = [[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.45, 0.35, 0.2]]
GOLDEN = {
    "l2": (
        [0.1482921389, 0.2274621463, 0.1263104594],
        [[0.2535855411, 0.5395811056, 0.2068333533], [0.1662479355, 0.719157129, 0.1145949355]],
    ),
    "cos": ([0.0635735138, 0.1038501348, 0.044616631], [[0.3025294391, 0.4443051139, 0.2531654471]]),
}
EQUAL = DomainInfo(("a", "b", "c"), (10, 10, 10), (1 / 3, 1 / 3, 1 / 3))


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(domains: DomainInfo = EQUAL, **parameters: Any) -> DynamicMoe:
    mixer = DynamicMoe(**{"count_steps": 1, **parameters})
    mixer.setup(domains)
    return mixer


def step(*layers: list[list[float]]) -> StepStats:
    return replace(stats({0: 1.0, 1: 1.0, 2: 1.0}), expert_load=double(layers))


def feed(mixer: DynamicMoe, number: int, *layers: list[list[float]]) -> list[float]:
    mixer.observe(step(*layers), EQUAL.initial_proportions, number)
    return mixer.proportions(update_context(), generator()).tolist()


def by_hand(weights: list[float], loads: list[list[float]], eta: float = 10.0, c: float = 0.05) -> list[float]:
    k = len(loads)
    far = [sum(math.dist(one, other) for other in loads) / k for one in loads]
    powers = [w * math.exp(eta * d) for w, d in zip(weights, far, strict=True)]
    return [(1 - c) * p / sum(powers) + c / k for p in powers]


@pytest.mark.parametrize("similarity", ["l2", "cos"])
def test_golden_distances_and_weights(similarity: Any) -> None:
    expected, weights = GOLDEN[similarity]
    assert distances(double(LOADS), similarity).tolist() == pytest.approx(expected, abs=5.1e-11)
    mixer = made(similarity=similarity)
    for number, golden in enumerate(weights):
        # Token counts, not shares: twice as many of one domain are the same loads.
        counts = [[x * (1000 + 1000 * d) for x in row] for d, row in enumerate(LOADS)]
        assert feed(mixer, number + 1, counts) == pytest.approx(golden, abs=5.1e-11)


def test_a_window_in_plain_python() -> None:
    mixer, weights = made(DOMAINS, count_steps=4), list(DOMAINS.initial_proportions)
    window = [[0.0] * 4 for _ in range(3)]
    for number in range(1, 25):
        counts = [[float((number * (d + 2) + 3 * e * d) % 11 + 1) for e in range(4)] for d in range(3)]
        window = [[a + b for a, b in zip(old, new, strict=True)] for old, new in zip(window, counts, strict=True)]
        if number % 4 == 0:
            weights = by_hand(weights, [[x / sum(row) for x in row] for row in window])
            window = [[0.0] * 4 for _ in range(3)]
        assert feed(mixer, number, counts) == pytest.approx(weights, rel=1e-12)


def test_equal_loads_leave_equal_weights_and_order_of_experts_does_not_matter() -> None:
    assert feed(made(), 1, [[3.0, 1.0], [6.0, 2.0], [9.0, 3.0]]) == pytest.approx([1 / 3] * 3)
    turned = [[row[2], row[0], row[1]] for row in LOADS]
    assert feed(made(), 1, turned) == pytest.approx(GOLDEN["l2"][1][0], abs=5.1e-11)


def test_loads_that_stay_apart_end_in_one_domain_and_the_share_that_is_spread() -> None:
    mixer = made()
    for number in range(60):
        found = feed(mixer, number, LOADS)
    assert found[1] > 0.9 and min(found) >= 0.05 / 3


def test_last_layer_with_experts_or_all_of_them() -> None:
    other, dense = [[0.9, 0.05, 0.05], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]], [[0.0] * 3] * 3
    last = feed(made(), 1, other, LOADS, dense)
    assert last == pytest.approx(GOLDEN["l2"][1][0], abs=5.1e-11)
    mean = (distances(double(other), "l2") + distances(double(LOADS), "l2")) / 2
    expected = exponentiated_gradient_step(double(EQUAL.initial_proportions), mean, 10.0, 0.05)
    assert feed(made(layers="all"), 1, other, LOADS, dense) == pytest.approx(expected.tolist())


def test_a_domain_that_was_not_drawn_keeps_its_loads_and_before_its_first_it_is_the_mean() -> None:
    mixer = made()
    two = distances(double([LOADS[0], LOADS[2]]), "l2").tolist()
    feed(mixer, 1, [LOADS[0], [0.0] * 3, LOADS[2]])
    assert mixer.report()["distances"] == pytest.approx([two[0], sum(two) / 2, two[1]])
    feed(mixer, 2, LOADS)
    feed(mixer, 3, [[0.0] * 3, LOADS[1], [0.0] * 3])
    assert mixer.report()["distances"] == pytest.approx(GOLDEN["l2"][0], abs=5.1e-11)


def test_an_unfinished_window_survives_a_restart() -> None:
    whole, resumed = made(count_steps=3), made(count_steps=3)
    for number in (1, 2, 3, 4):
        feed(whole, number, LOADS)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for number in (5, 6, 7):
        assert feed(whole, number, LOADS[::-1]) == feed(resumed, number, LOADS[::-1])
    assert whole.state_dict() == resumed.state_dict()


def test_without_counts_it_fails_and_state_of_other_domains_is_refused() -> None:
    with pytest.raises(TrainingFault, match="routers' counts"):
        made().observe(replace(stats({0: 1.0}), expert_load=None), EQUAL.initial_proportions, 1)
    with pytest.raises(CheckpointError, match="3 domains, this run has 1"):
        made(DomainInfo(("a",), (1,), (1.0,))).load_state_dict(made().state_dict())


@pytest.mark.parametrize(("key", "value"), [("eta", 0.0), ("eta", math.nan), ("c", 1.0), ("count_steps", 0)])
def test_wrong_parameters_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"mixer\.dynamic_moe\.{key}: must be .*found"):
        made(**{key: value})
