"""The order of samples: a pure function of (plan, step), without repeats before a domain's epoch ends."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import DataError, TrainingFault
from dataflex_mega.types import SamplingPlan

SIZES, G = (50, 7, 1000, 1), 12
MIX = (0.4, 0.1, 0.45, 0.05)


def sampler(seed: int = 5) -> Sampler:
    return Sampler(SIZES, G, seed)


def batches(order: Sampler, plan: SamplingPlan, first: int, last: int) -> np.ndarray:
    """[steps * G] the ids of steps first .. last - 1."""
    return np.concatenate([order.global_batch(plan, step) for step in range(first, last)])


def domains_of(ids: np.ndarray, sizes: tuple[int, ...] = SIZES) -> np.ndarray:
    return np.searchsorted(np.cumsum(sizes), ids, side="right")


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_a_batch_is_a_pure_function_of_plan_and_step() -> None:
    warm, plan = sampler(), sampler().next_plan(None, 0, MIX)
    expected = {step: sampler().global_batch(plan, step) for step in range(40)}  # a fresh sampler each: no cache
    for step in [0, 1, 2, 39, 3, 3, 38, 17, 0, 39]:
        assert np.array_equal(warm.global_batch(plan, step), expected[step])
        assert np.array_equal(warm.global_batch(replace(plan), step), expected[step])


def test_a_batch_holds_the_counts_the_sampler_announces() -> None:
    order = sampler()
    plan = order.next_plan(None, 0, MIX)
    total = np.zeros(4, np.int64)
    for step in range(200):
        assert np.array_equal(order.counts_before(plan, step), total)
        found = np.bincount(domains_of(order.global_batch(plan, step)), minlength=4)
        assert np.array_equal(found, order.counts_at(plan, step)) and found.sum() == G
        total += found
        assert np.abs(total - G * np.asarray(MIX) * (step + 1)).max() < 1


def test_no_row_repeats_before_the_epoch_of_its_domain_ends() -> None:
    order = sampler()
    drawn = batches(order, order.next_plan(None, 0, MIX), 0, 400)
    for domain, size in enumerate(SIZES):
        mine = drawn[domains_of(drawn) == domain]
        seen = np.asarray(sorted(Counter(mine.tolist()).values()))
        # The order within a batch is shuffled, so epochs are told apart by how often each row came by the end.
        assert seen.max() - (seen.min() if len(seen) == size else 0) <= 1
        assert len(seen) == min(size, len(mine))


def test_epochs_of_a_domain_have_different_orders() -> None:
    order = Sampler((60,), 20, 0)
    plan = order.next_plan(None, 0, [1.0])
    first, second = (batches(order, plan, a, a + 3) for a in (0, 3))
    assert sorted(first) == sorted(second) == list(range(60))
    assert set(first[:20]) != set(second[:20])


def test_a_batch_mixes_its_domains_so_that_every_rank_gets_all_of_them() -> None:
    order = Sampler((10_000, 10_000), 64, 0)
    plan = order.next_plan(None, 0, [0.5, 0.5])
    shares = [domains_of(order.global_batch(plan, s), (10_000, 10_000)).reshape(4, 16).mean(axis=1) for s in range(300)]
    assert np.abs(np.mean(shares, axis=0) - 0.5).max() < 0.03
    orders = {tuple(domains_of(order.global_batch(plan, s), (10_000, 10_000))) for s in range(50)}
    assert len(orders) == 50


def test_the_seed_changes_the_rows_and_domains_do_not_share_an_order() -> None:
    plan = sampler().next_plan(None, 0, MIX)
    assert not np.array_equal(sampler(0).global_batch(plan, 0), sampler(1).global_batch(plan, 0))
    twins = Sampler((500, 500), 2, 0)
    drawn = batches(twins, twins.next_plan(None, 0, [0.5, 0.5]), 0, 100)
    rows = [[int(i) % 500 for i in drawn if i // 500 == d] for d in (0, 1)]
    assert rows[0] != rows[1]


@pytest.mark.parametrize("start", [1, 9, 37])
def test_an_advanced_plan_has_the_same_future(start: int) -> None:
    order = sampler()
    plan = order.next_plan(None, 0, MIX, domain_loss_weights=(1.0, 2.0, 3.0, 4.0), phase="warmup")
    moved = order.plan_from(plan, start)
    assert (moved.start_step, moved.phase, moved.domain_loss_weights) == (start, "warmup", (1.0, 2.0, 3.0, 4.0))
    assert np.array_equal(batches(sampler(), plan, start, start + 60), batches(sampler(), moved, start, start + 60))
    twice = order.plan_from(order.plan_from(plan, start), start + 5)
    assert twice.digest() == order.plan_from(plan, start + 5).digest()


def test_an_advanced_selection_has_the_same_future() -> None:
    order = sampler()
    chosen = torch.arange(10, 900, 7)
    pool = order.next_plan(None, 0, MIX)
    for proportions in (None, (0.5, 0.0, 0.5, 0.0)):
        plan = order.next_plan(pool, 4, proportions, selected_ids=chosen)
        moved = order.plan_from(plan, 9)
        assert moved.pool_cursors == plan.pool_cursors and moved.selected_ids is chosen
        assert np.array_equal(batches(sampler(), plan, 9, 40), batches(sampler(), moved, 9, 40))


def test_a_new_mixture_goes_on_in_every_domain_where_the_old_one_stood() -> None:
    order = sampler()
    plan = order.next_plan(None, 0, MIX)
    drawn = [batches(order, plan, 0, 4)]
    for start, mixture in ((4, (0.1, 0.0, 0.9, 0.0)), (8, (0.3, 0.05, 0.65, 0.0))):
        plan = order.next_plan(plan, start, mixture)
        drawn.append(batches(order, plan, start, start + 4))
    whole = np.concatenate(drawn)
    assert max(Counter(whole[domains_of(whole) == 2].tolist()).values()) == 1
    assert max(Counter(whole[domains_of(whole) == 0].tolist()).values()) == 1


def test_drawn_shares_follow_a_changing_mixture_within_a_sample_or_so() -> None:
    order, rng = sampler(), np.random.default_rng(0)
    plan, target, drawn = None, np.zeros(4), np.zeros(4)
    for step in range(0, 300, 3):
        mixture = rng.dirichlet(np.ones(4))
        plan = order.next_plan(plan, step, mixture.tolist())
        for inner in range(step, step + 3):
            drawn += order.counts_at(plan, inner)
            target += G * mixture
            assert np.abs(drawn - target).max() < 1.25


def test_the_first_plan_starts_at_zero() -> None:
    plan = sampler().next_plan(None, 0, MIX)
    assert plan.cursors == (0, 0, 0, 0) and plan.credits == (0.0, 0.0, 0.0, 0.0)
    assert plan.selected_ids is None and plan.pool_cursors == () and plan.proportions == MIX


@pytest.mark.parametrize("size", [1, 3, 8])
def test_every_chosen_id_is_drawn_exactly_once(size: int) -> None:
    rng = np.random.default_rng(size)
    sizes = (400, 1, 2, 1000, 30)
    for trial in range(20):
        order = Sampler(sizes, size, trial)
        steps = int(rng.integers(1, 150))
        chosen = np.sort(rng.choice(sum(sizes), steps * size, replace=False))
        if trial % 2:
            chosen[-1] = 401  # from the domain of two rows, at least once
            chosen = np.sort(chosen)
        pool = order.next_plan(None, 0, (0.2, 0.2, 0.2, 0.2, 0.2))
        plan = order.next_plan(pool, 6, None, selected_ids=torch.from_numpy(chosen))
        assert np.array_equal(np.sort(batches(order, plan, 6, 6 + steps)), chosen)


def test_a_large_selection_is_drawn_exactly_once_despite_rounding() -> None:
    """Domain shares that are no binary fractions, over many steps."""
    sizes = (200_003, 3, 99_991, 7)
    order = Sampler(sizes, 4, 0)
    chosen = torch.arange(sum(sizes) - sum(sizes) % 4)
    plan = order.next_plan(None, 0, None, selected_ids=chosen)
    steps = len(chosen) // 4
    assert (
        order.counts_before(plan, steps).tolist()
        == np.bincount(domains_of(chosen.numpy(), sizes), minlength=4).tolist()
    )


def test_duplicates_among_the_chosen_are_drawn_as_often_as_they_occur() -> None:
    order = sampler()
    chosen = ids(*sorted([3, 3, 3, 52, 52, 60, 61, 62, 63, 64, 1057, 1057]))
    plan = order.next_plan(None, 0, None, selected_ids=chosen)
    assert np.array_equal(np.sort(order.global_batch(plan, 0)), chosen.numpy())


def test_after_a_selection_the_pool_goes_on_where_it_stood() -> None:
    order = sampler()
    plan = order.next_plan(None, 0, MIX)
    before = batches(order, plan, 0, 3)
    stood = order.plan_from(plan, 3).cursors
    selection = order.next_plan(plan, 3, None, selected_ids=torch.arange(24))
    assert selection.pool_cursors == stood and selection.cursors == (0, 0, 0, 0)
    again = order.next_plan(selection, 5, None, selected_ids=torch.arange(100, 124))  # one selection after the other
    assert again.pool_cursors == stood
    pool = order.next_plan(again, 7, MIX)
    assert pool.cursors == stood and pool.selected_ids is None
    both = np.concatenate([before, batches(order, pool, 7, 10)])
    big = both[domains_of(both) == 2]
    assert len(set(big.tolist())) == len(big)


def test_selection_and_mixture_together_keep_both() -> None:
    order = sampler()
    pool = order.next_plan(None, 0, MIX)
    chosen = torch.cat([torch.arange(0, 20), torch.arange(100, 400)])
    plan = order.next_plan(pool, 5, (0.25, 0.0, 0.75, 0.0), selected_ids=chosen)
    assert plan.credits == order.plan_from(pool, 5).credits and any(plan.credits)
    drawn = batches(order, plan, 5, 11)
    assert set(drawn.tolist()) <= set(chosen.tolist())
    assert np.abs(np.bincount(domains_of(drawn), minlength=4) - 72 * np.asarray([0.25, 0, 0.75, 0])).max() < 2


def test_two_selections_of_the_same_ids_come_in_another_order() -> None:
    order = Sampler((1000,), 10, 0)
    chosen = torch.arange(200, 260)
    first = order.next_plan(None, 0, None, selected_ids=chosen)
    second = order.next_plan(first, 6, None, selected_ids=chosen)
    assert set(batches(order, first, 0, 1)) != set(batches(order, second, 6, 7))


def test_many_plans_at_once_do_not_disturb_each_other() -> None:
    order = sampler()
    plans = [order.next_plan(None, 0, tuple(np.roll(MIX, n))) for n in range(4)] * 3
    expected = [sampler().global_batch(plan, 11) for plan in plans]
    for step in (11, 50, 11):
        for plan, wanted in zip(plans, expected, strict=True):
            found = order.global_batch(plan, step)
            assert step != 11 or np.array_equal(found, wanted)


def test_threads_may_ask_the_same_sampler() -> None:
    order, plan = sampler(), sampler().next_plan(None, 0, MIX)
    expected = [sampler().global_batch(plan, step) for step in range(60)]
    wrong: list[int] = []

    def ask(shift: int) -> None:
        for n in range(60):
            step = (n * 7 + shift) % 60
            if not np.array_equal(order.global_batch(plan, step), expected[step]):
                wrong.append(step)

    threads = [threading.Thread(target=ask, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_pool_of_a_trillion_needs_no_memory_for_its_order() -> None:
    order = Sampler((10**12 - 12_345, 12_345), 512, 0)
    plan = order.next_plan(None, 0, (0.9, 0.1))
    tracemalloc.start()
    drawn = batches(order, plan, 0, 50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(np.unique(drawn)) > 0.999 * 0.9 * len(drawn) and drawn.max() < 10**12


def test_the_cache_stays_small_over_many_steps_and_plans() -> None:
    order = sampler()
    for n in range(20):
        plan = order.next_plan(None, n, MIX)
        for step in range(n, n + 100):
            order.counts_at(plan, step)
    assert len(order._plans) <= 4
    assert all(len(ready.steps) <= 32 for ready in order._plans.values())


def test_an_empty_domain_with_a_proportion_is_refused_by_index() -> None:
    order = Sampler((10, 0, 5), 2, 0)
    with pytest.raises(DataError, match=r"domain 1 has proportion 0\.2"):
        order.next_plan(None, 0, (0.5, 0.2, 0.3))
    order.next_plan(None, 0, (0.5, 0.0, 0.5))
    with pytest.raises(DataError, match=r"domain 2 has proportion 0\.5 but no sample in the selection"):
        plan = order.next_plan(None, 0, (0.5, 0.0, 0.5), selected_ids=ids(1, 2, 3))
        order.global_batch(plan, 0)


def test_a_proportion_too_small_to_be_drawn_needs_no_chosen_sample() -> None:
    order = Sampler((100, 100), 4, 0)
    plan = order.next_plan(None, 0, (0.999, 0.001), selected_ids=torch.arange(8))
    assert sorted(batches(order, plan, 0, 2)) == list(range(8))


@pytest.mark.parametrize(
    "mixture", [(0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (float("nan"), 0.5, 0.5, 0.0), (1.5, -0.5, 0.0, 0.0)]
)
def test_wrong_proportions_of_a_mixer_stop_the_run(mixture: tuple[float, ...]) -> None:
    with pytest.raises(TrainingFault, match="proportions of step 3 must be 4 finite numbers"):
        sampler().next_plan(None, 3, mixture)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (ids(), DataError, "empty"),
        (ids(3, 2), ValueError, "sorted"),
        (ids(-1, 2), DataError, r"0\.\.1057"),
        (ids(2, 1058), DataError, "found 2..1058"),
    ],
)
def test_wrong_selections_are_refused(chosen: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sampler().next_plan(None, 0, None, selected_ids=chosen)


def test_other_wrong_arguments_are_refused() -> None:
    order = sampler()
    plan = order.next_plan(None, 4, MIX)
    with pytest.raises(ValueError, match="before the plan's start"):
        order.global_batch(plan, 3)
    with pytest.raises(ValueError, match="proportions are needed"):
        order.next_plan(plan, 5, None)
    with pytest.raises(DataError, match="sizes"):
        Sampler((), 4, 0)
    with pytest.raises(DataError, match="sizes"):
        Sampler((3, -1), 4, 0)
    with pytest.raises(ValueError, match="batch_size"):
        Sampler((3,), 0, 0)
