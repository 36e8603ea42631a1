"""The candidates of each update of a run."""

import numpy as np
import pytest
import torch

from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.errors import CheckpointError

SIZES = (40, 1, 60, 0)


def by_domain(ids):
    return np.searchsorted([40, 41, 101], ids, side="right")


def test_candidates_are_sorted_distinct_and_a_fraction_of_every_domain():
    rotation = CandidateRotation(SIZES, 0.1, seed=3)
    for update in range(30):
        ids = rotation.ids(update)
        assert (
            len(ids) == rotation.num_total() == 11 and (np.diff(ids) > 0).all() and ids.min() >= 0 and ids.max() < 101
        )
        assert np.bincount(by_domain(ids)).tolist() == [4, 1, 6]


def test_every_sample_has_its_turn_before_any_has_a_second_one():
    rotation = CandidateRotation((40,), 0.1, seed=3)
    first, second = (np.concatenate([rotation.ids(u) for u in range(start, start + 10)]) for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first.tolist() != second.tolist(), "another order"


def test_a_fraction_that_does_not_divide_the_domain_leaves_nothing_out():
    rotation = CandidateRotation((10,), 0.3, seed=1)
    chunks = [rotation.ids(update) for update in range(4)]
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 3]
    assert set(np.concatenate(chunks)) == set(range(10))


def test_candidates_are_a_function_of_seed_and_update():
    one, other = CandidateRotation(SIZES, 0.2, seed=3), CandidateRotation(SIZES, 0.2, seed=4)
    for update in (5, 2, 5):
        assert np.array_equal(one.ids(update), CandidateRotation(SIZES, 0.2, seed=3).ids(update))
    assert not np.array_equal(one.ids(0), other.ids(0)) and not np.array_equal(one.ids(0), one.ids(1))


def test_there_are_as_many_candidates_as_will_be_drawn_from_a_domain():
    rotation = CandidateRotation(SIZES, 0.1, seed=3)
    for update in range(12):
        counts = np.bincount(by_domain(rotation.ids(update, min_per_domain=[10, 5, 0, 0]))).tolist()
        assert counts == [10, 1, 6]
        assert set(rotation.ids(update)[by_domain(rotation.ids(update)) == 2]) <= set(
            rotation.ids(update, min_per_domain=[10, 5, 0, 0])
        )


def test_scores_are_reused_until_a_sample_is_scored_again():
    rotation = CandidateRotation((5,), 0.4, seed=0, reuse_old_scores=True)
    scored_ids, scores = rotation.merge_scores(np.array([1, 3]), torch.tensor([0.5, float("nan")]))
    assert scored_ids.tolist() == [1, 3] and scores.tolist() == [0.5, -float("inf")]
    state = rotation.state_dict()
    scored_ids, scores = rotation.merge_scores(np.array([0, 1]), torch.tensor([2.0, 3.0]))
    assert scored_ids.tolist() == [0, 1, 3] and scores.tolist() == [2.0, 3.0, -float("inf")]
    again = CandidateRotation((5,), 0.4, seed=0, reuse_old_scores=True)
    again.load_state_dict(state)
    assert torch.equal(again.merge_scores(np.array([0, 1]), torch.tensor([2.0, 3.0]))[1], scores)
    with pytest.raises(CheckpointError, match="scores of 5 samples, the pool has 6"):
        CandidateRotation((6,), 0.4, seed=0, reuse_old_scores=True).load_state_dict(state)


def test_without_reuse_only_what_was_just_scored_may_be_selected():
    rotation = CandidateRotation((5,), 0.4, seed=0)
    rotation.merge_scores(np.array([1, 3]), torch.tensor([0.5, 0.1]))
    assert (
        rotation.merge_scores(np.array([0, 1]), torch.tensor([2.0, 3.0]))[0].tolist() == [0, 1]
        and rotation.state_dict() == {}
    )


def test_several_scores_per_sample_are_reused():
    rotation = CandidateRotation((4,), 0.5, 0, reuse_old_scores=True)
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rotation.merge_scores(np.array([0, 2]), first)
    scored_ids, scores = rotation.merge_scores(np.array([2, 3]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert scored_ids.tolist() == [0, 2, 3] and scores.tolist() == [[1, 2], [5, 6], [7, 8]]
    other = CandidateRotation((4,), 0.5, 0, reuse_old_scores=True)
    other.load_state_dict(rotation.state_dict())
    assert other.merge_scores(np.array([0]), first[:1])[0].tolist() == [0, 2, 3]
