"""Batches in lockstep: every item once over all ranks, equally many batches on each, fillers that do not count."""

import numpy as np
import pytest

from dataflex_mega.data.collate import collate
from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches, lockstep_shares
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.types import IGNORE_INDEX


class Rows:
    """Rows of two tokens, the row's number twice."""

    def __len__(self):
        return 11

    def fetch(self, rows):
        return [(np.full(2, row), np.full(2, row)) for row in rows.tolist()]


def test_batches_follow_each_other_and_the_filler_comes_after_them():
    batches = [(ids.tolist(), count) for ids, count in lockstep_batches(np.arange(3, 8), 2, 5)]
    assert batches == [([3, 4], 2), ([5, 6], 2), ([7], 1), ([3], 0), ([3], 0)]


def test_a_rank_without_ids_computes_sample_0():
    assert [(ids.tolist(), count) for ids, count in lockstep_batches(np.arange(0), 2, 2)] == [([0], 0)] * 2


def test_lists_and_a_filler_of_the_callers():
    assert list(lockstep_batches(["a", "b", "c"], 2, 3, filler=["z"])) == [(["a", "b"], 2), (["c"], 1), (["z"], 0)]
    ids = [ids.tolist() for ids, _ in lockstep_batches(np.arange(4, 5), 1, 2, filler=FIRST_ID)]
    assert ids == [[4], [0]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_shares_hold_every_id_once_in_equally_many_batches(dp_size, batch_size):
    ids, pool = np.array([2, 3, 5, 7, 10]), SamplePool([Domain("a", Rows())])
    shares = [lockstep_shares(pool, ids, lambda s: collate(s, 0), batch_size, rank, dp_size) for rank in range(dp_size)]
    assert len({len(batches) for batches in shares}) == 1
    counted = [b.sample_ids for batches in shares for b in batches if (b.labels != IGNORE_INDEX).any()]
    assert [i for sample_ids in counted for i in sample_ids.tolist()] == ids.tolist()
    fillers = [b.sample_ids for batches in shares for b in batches if (b.labels == IGNORE_INDEX).all()]
    assert all(sample_ids.tolist() == [2] for sample_ids in fillers)
