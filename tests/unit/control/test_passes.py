"""Passes over the pool: the pattern continues when scores or the pool change, and no sample repeats in a pass."""

import json

import pytest
import torch

from dataflex_mega.control.passes import OrderedPasses, OrderOptions, fill_non_finite
from dataflex_mega.errors import DataError
from dataflex_mega.registry import build

FOLDING, ZIGZAG = {"name": "folding", "layers": 3}, {"name": "zigzag", "layers": 3}
SAW = {"name": "saw", "num_sections": 3, "folding_ratio": 0.075, "layers": 2}
PATTERNS = ["sorting", "shuffle", "segment", FOLDING, ZIGZAG, SAW, {"name": "stair", "folding_ratio": 0.2, "layers": 3}]


def ordered_passes(spec, bounds=(0, 60), **options):
    return OrderedPasses(build("reorder", spec), OrderOptions(**options), bounds)


def intervals(made, scores_of, count=6, size=10):
    """Means of the scores of each interval, scored anew before each."""
    means, ids = [], []
    for number in range(count):
        made.set_scores(scores_of(number))
        ids.append(made.next_ids(0, size))
        means.append(round(float(ids[-1].double().mean()), 1))
    return means, torch.cat(ids).tolist()


@pytest.mark.parametrize(
    ("spec", "means"),
    [
        (FOLDING, [13.5, 43.5, 14.5, 44.5, 15.5, 45.5]),
        (ZIGZAG, [13.5, 43.5, 44.5, 14.5, 15.5, 45.5]),
        (SAW, [4.5, 15.1, 23.9, 35.1, 43.9, 54.5]),
    ],
)
def test_a_pattern_keeps_its_shape_when_it_is_scored_before_every_interval(spec, means):
    found, ids = intervals(ordered_passes(spec), lambda number: torch.arange(60.0))
    assert found == means
    assert sorted(ids) == list(range(60))


@pytest.mark.parametrize("spec", PATTERNS, ids=str)
@pytest.mark.parametrize("shuffle_block", [0, 7])
def test_scoring_again_with_the_same_scores_changes_nothing(spec, shuffle_block):
    scores = torch.rand(60, generator=torch.Generator().manual_seed(1))
    once, often = ordered_passes(spec, shuffle_block=shuffle_block), ordered_passes(spec, shuffle_block=shuffle_block)
    once.set_scores(scores)
    expected = once.next_ids(0, 60).tolist()
    found = []
    for count in (7, 1, 13, 20, 19):
        often.set_scores(scores.clone())
        found += often.next_ids(0, count).tolist()
    assert found == expected and sorted(found) == list(range(60))


def test_new_scores_reverse_who_stands_where_and_not_the_pattern():
    made = ordered_passes(FOLDING)
    means, ids = intervals(made, lambda n: torch.arange(60.0) * (-1) ** n)
    assert sorted(ids) == list(range(60))
    assert means[0] == 13.5
    made = ordered_passes(FOLDING)
    made.set_scores(torch.arange(60.0))
    first = made.next_ids(0, 10)
    made.set_scores(-torch.arange(60.0))
    left = sorted(set(range(60)) - set(first.tolist()), reverse=True)  # from the lowest new score on
    # What is left of the pass has the ranks 30, 33, ..., 57 at its next ten places: the fourth, ... of 50 ranks left.
    remaining = [*range(30, 60, 3), *range(1, 60, 3), *range(2, 60, 3)]
    expected = [left[sorted(remaining).index(rank)] for rank in remaining[:10]]
    assert made.next_ids(0, 10).tolist() == expected


def test_a_pass_is_followed_by_another_within_one_request():
    made = ordered_passes("sorting", bounds=(0, 5))
    made.set_scores(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]))
    assert made.next_ids(0, 3).tolist() == [1, 2, 0]
    assert made.next_ids(0, 9).tolist() == [4, 3, 1, 2, 0, 4, 3, 1, 2]
    assert made.num_completed == [2] and made.num_served == [2]


def test_a_sample_is_served_once_whatever_the_pool_does():
    made = ordered_passes("sorting")
    made.set_scores(torch.arange(60.0))
    seen = []
    for pool in (range(0, 40), range(10, 50), range(20, 60), range(0, 60), range(0, 60), range(0, 60)):
        made.restrict_to(torch.tensor(list(pool)))
        seen += made.next_ids(0, 10).tolist()
        assert set(seen[-10:]) <= set(pool)
    assert sorted(seen) == list(range(60))


def test_every_group_has_a_pass_of_its_own():
    made = ordered_passes("sorting", bounds=(0, 4, 10), ascending=False)
    made.set_scores(torch.arange(10.0))
    assert made.next_ids(1, 3).tolist() == [9, 8, 7]
    assert made.next_ids(0, 6).tolist() == [3, 2, 1, 0, 3, 2]
    assert made.next_ids(1, 3).tolist() == [6, 5, 4]
    assert made.upcoming_ids([2, 0]).tolist() == [0, 1]
    assert made.upcoming_ids([3, 0]).tolist() == [0, 1, 2, 3]


def test_what_came_before_and_what_is_given_back():
    made = ordered_passes("sorting", bounds=(0, 8))
    made.mark_served(torch.tensor([0, 1]))
    made.set_scores(torch.arange(8.0))
    taken = made.next_ids(0, 4)
    assert taken.tolist() == [2, 3, 4, 5]
    made.return_unused(taken[2:])
    assert made.num_served == [2] and made.next_ids(0, 4).tolist() == [4, 5, 6, 7]
    made.restart()
    assert made.next_ids(0, 2).tolist() == [0, 1]


def test_unknown_scores_stand_in_the_middle():
    assert fill_non_finite(torch.tensor([1.0, float("nan"), 9.0, float("inf"), 3.0])).tolist() == [1, 3, 9, 3, 3]
    assert fill_non_finite(torch.tensor([1.0, float("nan"), 4.0])).tolist() == [1, 2.5, 4]
    assert fill_non_finite(torch.full((2,), float("nan"))).tolist() == [0, 0]


@pytest.mark.parametrize("spec", PATTERNS, ids=str)
def test_state_through_json_continues_bit_by_bit(spec):
    made, other = ordered_passes(spec, bounds=(0, 25, 60)), ordered_passes(spec, bounds=(0, 25, 60))
    made.set_scores(torch.rand(60))
    made.restrict_to(torch.arange(3, 60))
    made.next_ids(0, 30)
    made.next_ids(1, 11)
    saved = made.state_dict()
    tensors = {k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    other.load_state_dict({**json.loads(json.dumps({k: v for k, v in saved.items() if k not in tensors})), **tensors})
    for group in (0, 1, 1, 0):
        assert made.next_ids(group, 17).tolist() == other.next_ids(group, 17).tolist()


def test_nothing_to_order():
    made = ordered_passes("sorting", bounds=(0, 4, 8))
    made.set_scores(torch.arange(8.0))
    made.restrict_to(torch.arange(4))
    with pytest.raises(DataError, match="no sample of group 1"):
        made.next_ids(1, 1)
