"""Parts of the pool that a selection considers."""

import numpy as np
import pytest
import torch

from dataflex_mega.data.candidates import Candidates
from dataflex_mega.errors import CheckpointError

SIZES = (40, 1, 60, 0)


def by_domain(ids):
    return np.searchsorted([40, 41, 101], ids, side="right")


def test_a_part_is_sorted_distinct_and_of_every_domain_by_its_share():
    made = Candidates(SIZES, 0.1, seed=3)
    for update in range(30):
        ids = made.ids(update)
        assert len(ids) == made.total() == 11 and (np.diff(ids) > 0).all() and ids.min() >= 0 and ids.max() < 101
        assert np.bincount(by_domain(ids)).tolist() == [4, 1, 6]


def test_every_sample_has_its_turn_before_any_has_a_second_one():
    made = Candidates((40,), 0.1, seed=3)
    first, second = (np.concatenate([made.ids(u) for u in range(start, start + 10)]) for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first.tolist() != second.tolist(), "another order"


def test_a_share_that_does_not_divide_the_domain_leaves_nothing_out():
    made = Candidates((10,), 0.3, seed=1)
    parts = [made.ids(update) for update in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert set(np.concatenate(parts)) == set(range(10))


def test_a_part_is_a_function_of_seed_and_update():
    one, other = Candidates(SIZES, 0.2, seed=3), Candidates(SIZES, 0.2, seed=4)
    for update in (5, 2, 5):
        assert np.array_equal(one.ids(update), Candidates(SIZES, 0.2, seed=3).ids(update))
    assert not np.array_equal(one.ids(0), other.ids(0)) and not np.array_equal(one.ids(0), one.ids(1))


def test_parts_grow_to_what_will_be_drawn_of_a_domain():
    made = Candidates(SIZES, 0.1, seed=3)
    for update in range(12):
        counts = np.bincount(by_domain(made.ids(update, least=[10, 5, 0, 0]))).tolist()
        assert counts == [10, 1, 6]
        assert set(made.ids(update)[by_domain(made.ids(update)) == 2]) <= set(made.ids(update, least=[10, 5, 0, 0]))


def test_scores_are_kept_until_a_sample_is_scored_again():
    made = Candidates((5,), 0.4, seed=0, keeps=True)
    there, scores = made.merge(np.array([1, 3]), torch.tensor([0.5, float("nan")]))
    assert there.tolist() == [1, 3] and scores.tolist() == [0.5, -float("inf")]
    state = made.state()
    there, scores = made.merge(np.array([0, 1]), torch.tensor([2.0, 3.0]))
    assert there.tolist() == [0, 1, 3] and scores.tolist() == [2.0, 3.0, -float("inf")]
    again = Candidates((5,), 0.4, seed=0, keeps=True)
    again.restore(state)
    assert torch.equal(again.merge(np.array([0, 1]), torch.tensor([2.0, 3.0]))[1], scores)
    with pytest.raises(CheckpointError, match="scores of 5 samples, the pool has 6"):
        Candidates((6,), 0.4, seed=0, keeps=True).restore(state)


def test_without_keeping_only_what_was_just_scored_may_be_chosen():
    made = Candidates((5,), 0.4, seed=0)
    made.merge(np.array([1, 3]), torch.tensor([0.5, 0.1]))
    assert made.merge(np.array([0, 1]), torch.tensor([2.0, 3.0]))[0].tolist() == [0, 1] and made.state() == {}


def test_several_numbers_a_sample_are_kept_together():
    kept = Candidates((4,), 0.5, 0, keeps=True)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    kept.merge(np.array([0, 2]), first)
    there, scores = kept.merge(np.array([2, 3]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert there.tolist() == [0, 2, 3] and scores.tolist() == [[1, 2], [5, 6], [7, 8]]
    other = Candidates((4,), 0.5, 0, keeps=True)
    other.restore(kept.state())
    assert other.merge(np.array([0]), first[:1])[0].tolist() == [0, 2, 3]
