"""Collating: padded and packed rows, shifted labels, and first-fit-decreasing packing."""

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate, first_fit_decreasing
from dataflex_mega.data.pool import Sample
from dataflex_mega.types import IGNORE_INDEX


def sample(i, length):
    ids = np.arange(1, length + 1, dtype=np.int64) + 100 * i
    return Sample(i, i % 3, ids, ids)


def test_padded_rows_shift_labels_and_mark_padding():
    batch = collate([sample(0, 3), sample(1, 5)], pad_id=0)
    assert batch.input_ids.shape == (2, 8) and not batch.is_packed
    assert batch.labels[0].tolist() == [2, 3, IGNORE_INDEX, *[IGNORE_INDEX] * 5]
    assert batch.segment_ids[0].tolist() == [0, 0, 0, *[-1] * 5]
    assert batch.segment_ids[1].tolist() == [1] * 5 + [-1] * 3
    assert batch.sample_ids.tolist() == [0, 1] and batch.domain_ids.tolist() == [0, 1]


def test_packed_rows_keep_every_sample_whole_and_apart():
    lengths = [5, 9, 3, 7, 2, 12]
    samples = [sample(i, n) for i, n in enumerate(lengths)]
    batch = collate(samples, pad_id=0, pack_length=16)
    assert batch.is_packed and len(batch.input_ids) < len(samples)
    for i, n in enumerate(lengths):
        mine = batch.segment_ids == i
        assert mine.sum() == n and len(set(mine.nonzero()[:, 0].tolist())) == 1
        assert batch.input_ids[mine].tolist() == samples[i].input_ids.tolist()
        assert batch.position_ids[mine].tolist() == list(range(n))
        assert batch.labels[mine].tolist() == [*samples[i].labels[1:].tolist(), IGNORE_INDEX]


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing_places_each_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, size=30).tolist()
    rows = first_fit_decreasing(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(30))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    # No two rows could be joined by their lightest members alone: first fit leaves at most one row under half full.
    assert sum(sum(lengths[i] for i in row) * 2 <= 20 for row in rows) <= 1


def test_a_sample_longer_than_a_row_gets_one_of_its_own():
    batch = collate([sample(0, 20), sample(1, 4)], pad_id=0, pack_length=8)
    assert batch.input_ids.shape[0] == 2 and (batch.segment_ids == 0).sum() == 20


def test_moving_a_batch_keeps_it():
    batch = collate([sample(0, 3), sample(1, 4)], pad_id=0, pack_length=16)
    moved = batch.to(torch.device("cpu"))
    assert moved.is_packed and all(torch.equal(a, moved.tensors()[n]) for n, a in batch.tensors().items())
