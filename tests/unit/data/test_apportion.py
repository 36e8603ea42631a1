"""Counts of each domain: exact, never a sample or more away from their target."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest

from dataflex_mega.data.apportion import Apportioner


def random_proportions(rng: np.random.Generator, k: int) -> np.ndarray:
    """Even, uneven and tiny ones, some of them 0, some of them simple fractions."""
    shares = rng.dirichlet(np.full(k, 10.0 ** rng.uniform(-1.5, 1)))
    if rng.random() < 0.3:
        shares[rng.random(k) < 0.4] = 0
    if rng.random() < 0.3:
        shares = np.round(shares * rng.choice([4, 8, 100]))
    if not np.isfinite(shares).all() or shares.sum() == 0:
        shares = np.ones(k)
    return shares / shares.sum()


def test_counts_stay_within_one_sample_of_the_target_in_thousands_of_random_cases() -> None:
    rng = np.random.default_rng(1)
    for _ in range(2500):
        k, size = int(rng.integers(1, 51)), int(rng.choice([1, 2, 3, 7, 8, 64, 512]))
        shares = random_proportions(rng, k)
        walk = Apportioner(shares, np.zeros(k), size)
        for step in range(1, int(rng.integers(2, 60))):
            counts = walk.next_counts()
            assert counts.sum() == size and counts.min() >= 0
            assert np.abs(walk.cumulative_counts - size * shares * step).max() < 1


@pytest.mark.parametrize(
    ("parts", "size"),
    [([5, 5, 1, 1, 1, 1, 1], 1), ([9, 9, 1, 1, 1], 1), ([9, 3, 3, 1, 1, 1], 3), ([4, 4, 4, 1, 1, 1, 1], 2)],
)
def test_mixtures_in_which_serving_the_largest_lag_first_comes_a_sample_late(parts: list[int], size: int) -> None:
    """Found by search: a rule without deadlines reaches a lag of 1 in each of them."""
    total = sum(parts)
    walk = Apportioner(parts, [0.0] * len(parts), size)
    for step in range(1, 3 * total + 1):
        walk.next_counts()
        assert all(
            abs(int(c) * total - size * step * p) < total for c, p in zip(walk.cumulative_counts, parts, strict=True)
        )
    assert walk.cumulative_counts.tolist() == [3 * size * p for p in parts]


def partitions(total: int, largest: int) -> list[list[int]]:
    """All ways to write `total` as a sum of falling parts."""
    if total == 0:
        return [[]]
    return [[p, *rest] for p in range(min(total, largest), 0, -1) for rest in partitions(total - p, p)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_mixtures_of_small_parts_stay_within_one_sample_exactly(size: int) -> None:
    for total in range(1, 13):
        for parts in partitions(total, total):
            walk, shares = Apportioner(parts, [0.0] * len(parts), size), np.asarray(parts)
            for step in range(1, total + 1):
                assert walk.next_counts().sum() == size
                assert np.abs(walk.cumulative_counts * total - size * step * shares).max() < total


@pytest.mark.parametrize("size", [1, 8])
def test_tiny_proportions_are_served_in_the_long_run_too(size: int) -> None:
    shares = np.asarray([1e-4, 3e-4, 0.2, 0.7996])
    walk = Apportioner(shares, np.zeros(4), size)
    for step in range(1, 20_001):
        walk.next_counts()
        assert np.abs(walk.cumulative_counts - size * shares * step).max() < 1
    assert walk.cumulative_counts[0] == 2 * size


def test_whole_multiples_are_met_exactly_and_repeat() -> None:
    """1/3 is no binary fraction: without a tolerance one of three would be late at every third step."""
    walk = Apportioner([1 / 3, 1 / 3, 1 / 3], [0.0] * 3, 1)
    rounds = [tuple(walk.next_counts()) for _ in range(3000)]
    assert walk.cumulative_counts.tolist() == [1000, 1000, 1000]
    assert len(set(rounds)) == 3 and rounds[:3] * 1000 == rounds


def test_a_case_by_hand() -> None:
    walk = Apportioner([0.5, 0.25, 0.25], [0.0] * 3, 2)
    assert [walk.next_counts().tolist() for _ in range(4)] == [[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]]


def test_zero_proportions_are_never_drawn() -> None:
    walk = Apportioner([0.0, 0.3, 0.0, 0.7], [0.0] * 4, 5)
    for _ in range(200):
        assert walk.next_counts()[[0, 2]].tolist() == [0, 0]


def test_one_domain_takes_all() -> None:
    walk = Apportioner([1.0], [0.0], 9)
    assert [walk.next_counts().tolist() for _ in range(3)] == [[9]] * 3


def test_credit_is_target_minus_drawn_by_exact_fractions() -> None:
    shares, start = [0.125, 0.375, 0.5], [0.25, -0.5, 0.25]
    walk = Apportioner(shares, start, 7)
    for step in range(1, 50):
        walk.next_counts()
        targets = [Fraction(c) + 7 * Fraction(p) * step for p, c in zip(shares, start, strict=True)]
        owed = [float(t - int(c)) for t, c in zip(targets, walk.cumulative_counts, strict=True)]
        assert walk.credits_now().tolist() == owed


def test_continuing_from_the_credit_is_the_same_walk_bit_by_bit() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        shares = random_proportions(rng, 9)
        walk = Apportioner(shares, np.zeros(9), 24)
        for _ in range(int(rng.integers(1, 30))):
            walk.next_counts()
        again = Apportioner(shares, walk.credits_now(), 24)
        for _ in range(30):
            assert np.array_equal(walk.next_counts(), again.next_counts())
        assert np.array_equal(walk.credits_now(), again.credits_now())


@pytest.mark.parametrize("size", [8, 64, 512])
@pytest.mark.parametrize("k", [2, 7, 20, 50])
def test_lag_stays_small_when_the_mixture_changes_at_every_step(size: int, k: int) -> None:
    """No rule that cannot see the next mixture keeps it below 1 always; the largest seen in long trials was 1.02."""
    rng = np.random.default_rng(size + k)
    for concentration in (0.1, 1.0):
        credit = np.zeros(k)
        for _ in range(400):
            walk = Apportioner(rng.dirichlet(np.full(k, concentration)), credit, size)
            counts = walk.next_counts()
            assert counts.sum() == size and counts.min() >= 0
            credit = walk.credits_now()
            assert np.abs(credit).max() < 1.25
        assert abs(credit.sum()) < 1e-9


def test_a_debt_no_step_can_pay_is_paid_by_largest_lag_first() -> None:
    walk = Apportioner([0.0, 0.0, 1.0], [6.0, 3.5, -9.5], 4)
    served = [walk.next_counts().tolist() for _ in range(4)]
    assert served[0] == [3, 1, 0]  # lags 6 5 4 and 3.5, then 3 and 2.5 are left
    assert served[1] == [2, 2, 0]  # 3, 2.5, 2 and 1.5
    assert np.cumsum(served, axis=0)[2].tolist()[:2] == [6, 3]
    for _ in range(20):
        counts = walk.next_counts()
        assert counts.min() >= 0 and counts.sum() == 4
    assert np.abs(walk.credits_now()).max() < 1


def test_the_bound_returns_after_any_debt() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        k = int(rng.integers(2, 12))
        owed = rng.normal(0, 10, k)
        shares = rng.dirichlet(np.ones(k)) * 0.9 + 0.1 / k
        walk = Apportioner(shares, owed - owed.mean(), 16)
        for _ in range(600):
            assert walk.next_counts().min() >= 0
        assert np.abs(walk.credits_now()).max() < 1


def test_a_copy_is_a_snapshot() -> None:
    walk = Apportioner([0.4, 0.6], [0.0, 0.0], 3)
    walk.next_counts()
    kept = copy.copy(walk)
    expected = [walk.next_counts().tolist() for _ in range(5)]
    assert [kept.next_counts().tolist() for _ in range(5)] == expected


@pytest.mark.parametrize("size", [2**15, 2**16, 2**20, 2**24])
def test_large_batches_do_not_overflow(size: int) -> None:
    shares = np.asarray([0.1, 0.2, 0.3, 0.4])
    walk = Apportioner(shares, np.zeros(4), size)
    for step in range(1, 200):
        walk.next_counts()
        assert np.abs(walk.cumulative_counts - size * shares * step).max() < 1


@pytest.mark.parametrize(
    ("shares", "credit", "size", "message"),
    [
        ([0.5, 0.5], [0.0], 4, "one length"),
        ([], [], 4, "one length"),
        ([0.5, float("nan")], [0.0, 0.0], 4, "proportions must be finite"),
        ([1.5, -0.5], [0.0, 0.0], 4, "proportions must be finite"),
        ([0.0, 0.0], [0.0, 0.0], 4, "not all 0"),
        ([0.5, 0.5], [1.0, 0.0], 4, "sum to 0"),
        ([0.5, 0.5], [float("inf"), 0.0], 4, "credits must be finite"),
        ([0.5, 0.5], [0.0, 0.0], 0, "batch_size"),
    ],
)
def test_bad_arguments_are_refused(shares: list[float], credit: list[float], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Apportioner(shares, credit, size)
