"""Rows as they come, and rows in proportions until all are used up."""

import numpy as np
import pytest

from dataflex_mega.data.each_row_once import without_repeats
from dataflex_mega.data.natural_order import NaturalOrder
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import DataError

SIZES, G = (5, 11, 3), 4


def test_rows_come_in_the_order_of_the_files_and_then_again():
    order = NaturalOrder(SIZES, G, seed=1)
    plan = order.next_plan(None, 0, [s / sum(SIZES) for s in SIZES])
    drawn = np.concatenate([order.global_batch(plan, step) for step in range(12)])
    assert drawn.tolist() == [row % 19 for row in range(48)]
    counts = [
        np.bincount(np.searchsorted([5, 16, 19], drawn[s * G : s * G + G], side="right"), minlength=3)
        for s in range(12)
    ]
    for step in range(12):
        assert order.counts_at(plan, step).tolist() == counts[step].tolist()
        assert (
            order.counts_before(plan, step).tolist() == np.sum(counts[:step], axis=0).astype(int).tolist() or step == 0
        )


def test_a_plan_of_a_later_step_and_another_batch_size_goes_on_with_the_next_row():
    order = NaturalOrder(SIZES, G, seed=1)
    plan = order.next_plan(None, 0, [s / sum(SIZES) for s in SIZES])
    later = order.plan_from(plan, 7)
    assert sum(later.cursors) == 28 and order.global_batch(later, 9).tolist() == order.global_batch(plan, 9).tolist()
    wider = NaturalOrder(SIZES, 8, seed=1)
    assert wider.global_batch(later, 7).tolist() == [row % 19 for row in range(28, 36)]
    with pytest.raises(ValueError, match="before the plan's start"):
        order.global_batch(later, 6)


@pytest.mark.parametrize(
    ("sizes", "wanted"), [((30, 50, 20), (0.6, 0.3, 0.1)), ((7, 90, 1), (0.3, 0.3, 0.4)), ((40,), (1.0,))]
)
@pytest.mark.parametrize("size", [1, 4, 7])
def test_each_row_is_drawn_once_and_the_proportions_hold_until_a_domain_is_used_up(sizes, wanted, size):
    order = Sampler(sizes, size, seed=3)
    plan, drawn = order.next_plan(None, 0, wanted), []
    for step in range(sum(sizes) // size):
        plan = without_repeats(order, order.plan_from(plan, step), wanted, sizes)
        drawn.append(order.global_batch(plan, step))
    ids = np.concatenate(drawn)
    assert len(set(ids.tolist())) == len(ids) == sum(sizes) // size * size
    before_the_first_ends = int(min(n / p for n, p in zip(sizes, wanted, strict=True)) / size) - 1
    counts = np.bincount(
        np.searchsorted(np.cumsum(sizes), ids[: max(before_the_first_ends, 0) * size], side="right"),
        minlength=len(sizes),
    )
    assert np.abs(counts - np.asarray(wanted) * max(before_the_first_ends, 0) * size).max() < 1
    if sum(sizes) % size:
        with pytest.raises(DataError, match="rows are left for a batch of"):
            without_repeats(order, order.plan_from(plan, len(drawn)), wanted, sizes)
