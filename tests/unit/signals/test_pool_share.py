"""A rank's share of a pool: every sample once over all ranks, in batches that are equally many on each."""

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.signals.pool_share import PoolShare, evaluate, rank_counts, target_batches
from dataflex_mega.types import IGNORE_INDEX, SampleStats
from tests.support.rows import EqualTokens

POOL = SamplePool([Domain("a", EqualTokens(7, 10)), Domain("b", EqualTokens(4, 50))])


def shares(ranks, size=2, ids=None):
    return [PoolShare(POOL, size, rank, ranks, ids=ids) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ids", [None, np.array([1, 3, 4, 8, 10])])
def test_every_sample_is_once_on_a_rank_in_equally_many_batches(ranks, size, ids):
    parts = shares(ranks, size, ids)
    expected = list(range(11)) if ids is None else ids.tolist()
    assert [i for share in parts for i in share.local_ids().tolist()] == expected
    assert (
        [len(share.local_ids()) for share in parts] == parts[0].rank_counts() == rank_counts(len(expected), size, ranks)
    )
    assert [share.first_position() for share in parts] == np.cumsum([0, *parts[0].rank_counts()])[:-1].tolist()
    batches = [list(share.batches()) for share in parts]
    assert {len(found) for found in batches} == {parts[0].num_batches()}
    counted = [sample.sample_id for found in batches for samples, count in found for sample in samples[:count]]
    assert counted == expected


def test_batches_do_not_depend_on_the_number_of_ranks():
    def whole_batches(ranks):
        found = [(samples, count) for share in shares(ranks) for samples, count in share.batches() if count]
        return [tuple(s.sample_id for s in samples[:count]) for samples, count in found]

    assert whole_batches(1) == whole_batches(2) == whole_batches(3) == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10,)]


def test_a_subset_is_a_share_of_its_own():
    share = PoolShare(POOL, 2, 1, 2).subset(np.array([2, 5, 9]))
    assert share.local_ids().tolist() == [9] and share.first_position() == 2 and share.rank_counts() == [2, 1]


def test_progress_is_told_after_every_batch():
    told = []
    share = PoolShare(POOL, 4, 0, 1, progress=lambda done, total: told.append((done, total)))
    list(share.batches())
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_targets_are_divided_and_fillers_have_no_target():
    def collated(samples):
        return collate(samples, 0)

    groups = [SamplePool([Domain("t", EqualTokens(5, 0))]), SamplePool([Domain("u", EqualTokens(1, 0))])]
    parts = [target_batches(groups, collated, 2, rank, 2) for rank in range(2)]
    for number, size in enumerate((5, 1)):
        batches = [batch for part in parts for batch in part[number]]
        assert len({len(part[number]) for part in parts}) == 1
        rows = [(batch.labels != IGNORE_INDEX).any(dim=1) for batch in batches]
        found = [int(i) for batch, row in zip(batches, rows, strict=True) for i in batch.sample_ids[row]]
        assert found == list(range(size))


def test_losses_are_summed_by_domain_and_over_ranks():
    def losses(batch):
        count = torch.full((len(batch.sample_ids),), 3)
        return SampleStats(batch.sample_ids, batch.domain_ids, batch.sample_ids.float(), count)

    for ranks in (1, 3, 7):
        sums = [evaluate(share, lambda samples: collate(samples, 0), losses) for share in shares(ranks)]
        total, tokens = (torch.stack(part).sum(0).tolist() for part in zip(*sums, strict=True))
        assert total == [sum(range(7)), sum(range(7, 11))] and tokens == [21, 12]
