"""Pairs as samples, and their batches."""

import numpy as np
import pytest

from dataflex_mega.data.pairs import answered_tokens, collate_pairs, join_pair, split_pair
from dataflex_mega.data.pool import Domain, Sample, SamplePool
from dataflex_mega.errors import DataError
from dataflex_mega.types import IGNORE_INDEX

CHOSEN = (np.array([5, 6, 7, 8]), np.array([IGNORE_INDEX, IGNORE_INDEX, 7, 8]))
REJECTED = (np.array([5, 6, 9]), np.array([IGNORE_INDEX, IGNORE_INDEX, 9]))


def test_a_pair_comes_apart_as_it_was_put_together():
    chosen, rejected = split_pair(*join_pair(CHOSEN, REJECTED))
    for found, expected in zip((*chosen, *rejected), (*CHOSEN, *REJECTED), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_first_token_of_a_row_is_no_target():
    """Of a prompt that was cut away all labels are targets, and the first has nothing before it."""
    row = (np.array([3, 4]), np.array([3, 4]))
    _, rejected = split_pair(*join_pair(row, row))
    assert rejected[1].tolist() == [IGNORE_INDEX, 4]


def test_a_batch_has_the_chosen_rows_first():
    other = join_pair(REJECTED, CHOSEN)
    samples = [Sample(3, 0, *join_pair(CHOSEN, REJECTED)), Sample(8, 1, *other)]
    batch = collate_pairs(samples, pad_id=0)
    assert batch.input_ids.shape == (4, 8)
    assert [row[row > 0].tolist() for row in batch.input_ids] == [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9], [5, 6, 7, 8]]
    assert [row[row >= 0].tolist() for row in batch.labels] == [[7, 8], [9], [9], [7, 8]]
    assert batch.labels[0].tolist()[:4] == [IGNORE_INDEX, 7, 8, IGNORE_INDEX]
    assert [int(row.max()) for row in batch.segment_ids] == [0, 1, 0, 1]
    assert (batch.sample_ids.tolist(), batch.domain_ids.tolist()) == ([3, 8], [0, 1])
    assert batch.row_references is None


def test_references_follow_their_rows():
    samples = [
        Sample(i, 0, *join_pair(CHOSEN, REJECTED), reference_losses=np.array([i, 10 + i], np.float32)) for i in (0, 1)
    ]
    assert collate_pairs(samples, pad_id=0).row_references.tolist() == [0.0, 1.0, 10.0, 11.0]


def test_an_embedded_sample_is_the_chosen_answer():
    assert answered_tokens(Sample(0, 0, *join_pair(CHOSEN, REJECTED))).tolist() == [5, 6, 7, 8]
    assert answered_tokens(Sample(0, 0, *CHOSEN)).tolist() == [5, 6, 7, 8]


def test_a_row_without_a_token_is_refused():
    with pytest.raises(DataError, match="without a token"):
        join_pair(CHOSEN, (np.zeros(0, np.int64), np.zeros(0, np.int64)))


class _Pairs:
    def __len__(self):
        return 2

    def fetch(self, rows):
        return [join_pair(CHOSEN, REJECTED) for _ in rows]


class _Numbers:
    def __init__(self, width):
        self.width = width

    def fetch(self, ids):
        return [np.zeros(self.width, np.float32) for _ in ids]


def test_a_pool_of_pairs_takes_two_numbers_a_pair():
    pool = SamplePool([Domain("pairs", _Pairs())])
    sample = pool.with_references(_Numbers(2), 2).fetch(np.array([1]))[0]
    assert sample.reference_losses.shape == (2,)
    with pytest.raises(DataError, match="reference losses"):
        pool.with_references(_Numbers(7), 2).fetch(np.array([1]))
