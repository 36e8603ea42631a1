"""GREATS's choice against its golden example, all subsets, and what the weights do to a loss."""

import itertools

import pytest
import torch

from dataflex_mega.algorithms.requests import BatchGradientSignal
from dataflex_mega.algorithms.weighters.greats import Greats, greedy_select
from dataflex_mega.errors import ConfigError, TrainingFault
from dataflex_mega.types import BatchGradients, ProjectionSpec
from tests.unit.algorithms.examples import generator, observed

DOT = torch.tensor([3.0, 2.9, 1.0])
GRAM = torch.tensor([[4.0, 3.5, 0.0], [3.5, 4.0, 0.0], [0.0, 0.0, 2.0]])


def observe_batch(greats, ids, dot, gram):
    (request,) = greats.requests()
    greats.receive(request, BatchGradients(ids, dot, gram), 0)


def test_golden_choice_leaves_out_what_says_the_same():
    assert greedy_select(DOT, GRAM, 2, 1.0).tolist() == [0, 2]
    assert greedy_select(DOT, GRAM, 2, 0.0).tolist() == [0, 1], "the two largest gains"
    assert sorted(greedy_select(DOT, GRAM, 3, 1.0).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_every_step_lowers_a_quadratic_loss_as_much_as_one_sample_can(seed):
    """Greedy on f(S) = <sum g, h> - c/2 |sum g|^2 + c/2 sum |g|^2, whose increments are the gains; written with vectors."""
    g = torch.randn(7, 5, generator=generator(seed)).double()
    h = torch.randn(5, generator=generator(seed + 50)).double()

    def gained(subset):
        total = g[list(subset)].sum(0)
        return float(total @ h - 0.7 / 2 * (total @ total) + 0.7 / 2 * g[list(subset)].square().sum())

    taken = []
    for _ in range(4):
        taken.append(max((i for i in range(7) if i not in taken), key=lambda i: gained([*taken, i])))
    assert greedy_select(g @ h, g @ g.t(), 4, 0.7).tolist() == taken


def test_samples_without_interaction_are_taken_as_the_best_subset():
    dot = torch.tensor([0.3, -1.0, 2.0, 0.9, -0.2])
    best = max(itertools.combinations(range(5), 3), key=lambda s: float(dot[list(s)].sum()))
    assert sorted(greedy_select(dot, torch.eye(5), 3, 1.0).tolist()) == list(best)


def test_equal_gains_go_by_position_and_not_a_number_is_last():
    assert greedy_select(torch.tensor([1.0, float("nan"), 1.0]), torch.zeros(3, 3), 2, 1.0).tolist() == [0, 2]
    assert sorted(greedy_select(torch.tensor([1.0, float("nan"), 1.0]), torch.zeros(3, 3), 3, 1.0).tolist()) == [
        0,
        1,
        2,
    ]


def test_weights_are_those_of_the_coming_batch_in_any_order():
    greats = Greats(keep_ratio=0.5)
    observe_batch(greats, torch.tensor([7, 3, 9, 1]), torch.tensor([1.0, 5.0, 2.0, 4.0]), torch.zeros(4, 4))
    samples = observed([1.0, 1.0, 1.0, 1.0])
    for ids, expected in (([1, 3, 7, 9], [2, 2, 0, 0]), ([9, 7, 3, 1], [0, 0, 2, 2])):
        found = greats.weights(
            type(samples)(torch.tensor(ids), samples.domain_ids, samples.loss_sum, samples.num_tokens), 0, 10
        )
        assert found.tolist() == expected and float(found.mean()) == 1
    with pytest.raises(TrainingFault, match="step 6 trains samples that are not in the observed batch"):
        greats.weights(
            type(samples)(torch.tensor([1, 3, 7, 8]), samples.domain_ids, samples.loss_sum, samples.num_tokens), 5, 10
        )


def test_a_sample_that_is_drawn_twice_weighs_as_its_copies_together():
    greats = Greats(keep_ratio=0.5)
    observe_batch(
        greats, torch.tensor([5, 5, 2, 1]), torch.tensor([3.0, 3.0, 2.0, 1.0]), torch.zeros(4, 4) + torch.eye(4) * 2
    )
    samples = observed([1.0] * 4)
    found = greats.weights(
        type(samples)(torch.tensor([5, 5, 2, 1]), samples.domain_ids, samples.loss_sum, samples.num_tokens), 0, 10
    )
    assert found.tolist() == [2, 2, 0, 0]
    same = torch.tensor([[1.0, 1.0, 0, 0], [1.0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]) * 2
    observe_batch(greats, torch.tensor([5, 5, 2, 1]), torch.tensor([3.0, 3.0, 2.0, 1.0]), same)
    found = greats.weights(
        type(samples)(torch.tensor([5, 5, 2, 1]), samples.domain_ids, samples.loss_sum, samples.num_tokens), 0, 10
    )
    assert found.tolist() == [1, 1, 2, 0], "one copy was taken: both weigh half of it"


@pytest.mark.parametrize(("keep_ratio", "count"), [(0.5, 4), (0.01, 1), (0.45, 4), (1.0, 8)])
def test_how_many_are_kept(keep_ratio, count):
    greats = Greats(keep_ratio=keep_ratio)
    observe_batch(greats, torch.arange(8), torch.rand(8, generator=generator()), torch.eye(8))
    weights = greats.weights(observed([1.0] * 8), 0, 1)
    assert int((weights > 0).sum()) == count and float(weights.mean()) == pytest.approx(1)
    assert weights.max() == pytest.approx(8 / count)


def test_what_it_asks_for_and_what_cannot_be():
    (request,) = Greats(side=8, seed=2, target_batch=5).requests()
    assert request == BatchGradientSignal(ProjectionSpec("two_sided", 8, 2), num_targets=5, adam=False)
    assert Greats(gradient_type="adam").requests()[0].adam
    for wrong in ({"keep_ratio": 0.0}, {"keep_ratio": 1.5}, {"curvature": -1.0}, {"target_batch": -1}, {"side": 0}):
        with pytest.raises(ConfigError, match=rf"weighter\.greats\.{next(iter(wrong))}:"):
            Greats(**wrong)
