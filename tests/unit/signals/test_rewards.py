"""Rewards against hand calculations, and the refusals of a user's own reward."""

import pytest

from dataflex_mega.errors import ConfigError, TrainingFault
from dataflex_mega.signals import rewards


def test_overlap_is_the_f1_of_words():
    overlaps = rewards.f1_overlap(
        [""] * 4, ["The cat sat", "a dog", "", "x x"], ["the cat stood up", "birds", "x", "x"]
    )
    assert overlaps == pytest.approx([2 * 2 / 7, 0, 0, 2 / 3])


def test_exact_and_number():
    answers, references = [" 42\n", "so 1,200.0", "7 then 8", "none"], ["42", "It is 1200", "8 then 7", "3"]
    assert rewards.exact_match([""] * 4, answers, references) == [1, 0, 0, 0]
    assert rewards.numeric_match([""] * 4, answers, references) == [1, 1, 0, 0]


def three(prompts, answers, references):
    return [len(answer) for answer in answers[:3]]


def test_a_function_of_ones_own():
    reward = rewards.load_reward(f"{__name__}:three")
    assert (
        rewards.compute_rewards(reward, ["p"] * 2, ["ab", "c"], ["r"] * 2) == [2, 1]
        and rewards.compute_rewards(reward, [], [], []) == []
    )
    with pytest.raises(TrainingFault, match="4 answers got 3 rewards"):
        rewards.compute_rewards(reward, ["p"] * 4, ["a"] * 4, ["r"] * 4)
    with pytest.raises(TrainingFault, match="nan for the answer 'bad'"):
        rewards.compute_rewards(lambda p, a, r: [0.0, float("nan")], ["p"] * 2, ["a", "bad"], ["r"] * 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overlop", "did you mean 'overlap'"),
        ("zzz", "there is overlap, exact, number"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
        ("math:no_such", "math has no function 'no_such'"),
    ],
)
def test_what_there_is_not_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        rewards.load_reward(name)
