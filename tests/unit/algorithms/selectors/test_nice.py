"""What NICE makes of rewards and scores, and its parameters."""

import pytest
import torch

from dataflex_mega.algorithms.selectors.nice import Nice
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import GenerationSpec, SignalTable
from tests.unit.algorithms.examples import generator, update_context

REWARDS = torch.tensor([[1.0, 0.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])


def test_factors_are_rewards():
    assert Nice().answer_weights(REWARDS).tolist() == REWARDS.tolist()


def test_the_best_answers_count_the_first_of_equal_ones():
    assert Nice(best=1).answer_weights(REWARDS).tolist() == [[0, 0, 3, 0], [0, 0, 0, 0]]
    assert Nice(best=3).answer_weights(REWARDS).tolist() == [[1, 0, 3, 3], [0, 0, 0, 0]]


def test_a_baseline_is_the_mean_reward_of_the_prompt():
    found = Nice(baseline="mean").answer_weights(REWARDS)
    assert found.tolist() == [[-0.75, -1.75, 1.25, 1.25], [0, 0, 0, 0]]
    assert Nice(baseline="mean", best=2).answer_weights(REWARDS).tolist() == [[0, 0, 1.25, 1.25], [0, 0, 0, 0]]


def test_scores_are_the_largest_cosine_and_never_not_a_number():
    dot, norm2 = torch.tensor([[1.0, 0.5], [0.0, 0.0], [-3.0, -1.0]]), torch.tensor([4.0, 0.0, 4.0])
    table = SignalTable(torch.arange(3), torch.zeros(3), {"dot": dot, "norm2": norm2})
    scores = Nice().score(table)
    assert scores.tolist() == [0.5, 0.0, -0.5]
    assert Nice().select(scores, 2, update_context(), generator()).tolist() == [0, 1]


def test_what_it_asks_for_and_what_cannot_be():
    assert Nice().requests()[0].name == "policy_adam" and Nice(gradient_type="sgd").requests()[0].name == "policy_sgd"
    (request,) = Nice(max_new_tokens=5, top_p=1.0, top_k=0, mc_samples=4, baseline="mean").requests()
    assert request.generation == GenerationSpec(5, 0.7, 0, 1.0) and request.num_answers == 4
    assert request.answer_weights(REWARDS).tolist() == Nice(baseline="mean").answer_weights(REWARDS).tolist()
    for wrong in ({"mc_samples": 0}, {"best": 5}, {"max_new_tokens": 0}, {"generation_temperature": 0.0}):
        with pytest.raises(ConfigError, match=rf"selector\.nice\.{next(iter(wrong))}:"):
            Nice(**wrong)
    with pytest.raises(ConfigError, match="top_p: must be > 0 and <= 1, found 1.5"):
        Nice(top_p=1.5)
