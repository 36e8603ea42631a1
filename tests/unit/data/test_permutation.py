"""The keyed permutation: a bijection of any size that looks random, in constant memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest

from dataflex_mega.data.permutation import LARGEST, extend_key, hash_key, permute, permute_each, shuffled_indices

GOLDEN_KEYS = [2611923443488327891, 11756190979820361809, 254762264336823340, 15574732934893814642]
GOLDEN_ORDER = [4, 2, 6, 1, 0, 3, 5, 7]


def whole(size: int, key: int) -> np.ndarray:
    return permute(np.arange(size), size, key)


@pytest.mark.parametrize("size", [*range(1, 130), 255, 256, 257, 1000, 1021, 1024, 4095, 4097, 99_991])
def test_every_size_gives_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1, hash_key(size)):
        assert np.array_equal(np.sort(whole(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [10**9 + 7, 10**12, 2**40, 2**40 + 1, LARGEST])
def test_huge_sizes_stay_in_range_and_never_collide(size: int) -> None:
    probes = np.arange(50_000) * ((size - 1) // 49_999)
    images = permute(probes, size, 3)
    assert images.min() >= 0 and images.max() < size
    assert len(np.unique(images)) == len(probes)
    neighbours = permute(np.arange(50_000), size, 3)
    assert len(np.unique(neighbours)) == 50_000


def test_access_is_random_access() -> None:
    index = np.asarray([5, 0, 999, 5, 123])
    assert np.array_equal(permute(index, 1000, 7), whole(1000, 7)[index])


def test_another_key_is_another_permutation() -> None:
    size, same = 10_000, []
    for a, b in itertools.pairwise(range(40)):
        same.append(int((whole(size, a) == whole(size, b)).sum()))
    assert np.mean(same) < 3  # 1 expected for independent permutations
    assert max(same) < 10


@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 12, 16])
def test_small_sizes_send_every_index_everywhere_equally_often(size: int) -> None:
    """Chi-square of (index, image) over keys; with s**2 cells and their margins fixed, (s - 1)**2 degrees of freedom."""
    keys = 4000
    seen = np.zeros((size, size))
    for key in range(keys):
        seen[np.arange(size), whole(size, hash_key(key, size))] += 1
    expected = keys / size
    freedom = (size - 1) ** 2
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("size", [4, 5])
def test_all_orders_of_a_small_size_occur(size: int) -> None:
    orders = {tuple(whole(size, hash_key(key))) for key in range(3000)}
    assert len(orders) == len(list(itertools.permutations(range(size))))


@pytest.mark.parametrize("size", [997, 65_536, 100_000])
def test_images_are_uniform_and_unrelated_to_the_index(size: int) -> None:
    images = whole(size, 11)
    displacement = np.abs(images - np.arange(size)).mean() / size
    assert displacement == pytest.approx(
        1 / 3, abs=4 * 0.24 / np.sqrt(size)
    )  # of two uniform numbers; their sd is 0.236
    assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 4.5 / np.sqrt(size)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 4.5 / np.sqrt(size)
    head = images[: size // 10]  # a tenth of the indices falls evenly into 20 classes of images
    counts = np.bincount(head * 20 // size, minlength=20)
    statistic = ((counts - len(head) / 20) ** 2 / (len(head) / 20)).sum()
    assert statistic < 19 + 5 * np.sqrt(38)


def test_number_of_fixed_points_is_that_of_random_permutations() -> None:
    fixed = [int((whole(500, hash_key(9, key)) == np.arange(500)).sum()) for key in range(600)]
    assert np.mean(fixed) == pytest.approx(1, abs=0.25)
    assert np.var(fixed) == pytest.approx(1, abs=0.4)


def test_permute_each_equals_permute_of_each() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(1, 10**6, 200)
    index = rng.integers(0, size)
    keys = rng.integers(0, 2**63, 200, dtype=np.uint64)
    alone = [permute(np.asarray([i]), int(n), int(k))[0] for i, n, k in zip(index, size, keys, strict=True)]
    assert np.array_equal(permute_each(index, size, keys), alone)


def test_permuting_a_huge_range_needs_no_table() -> None:
    tracemalloc.start()
    permute(np.arange(1000), 10**12, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(("index", "size"), [([0], 0), ([0], LARGEST + 1), ([3], 3), ([-1], 3)])
def test_out_of_range_is_refused(index: list[int], size: int) -> None:
    with pytest.raises(ValueError, match="must be in"):
        permute(np.asarray(index), size, 0)


def test_keys_are_fixed_for_ever() -> None:
    """Resuming depends on it: these numbers must never change."""
    assert [hash_key(), hash_key(0), hash_key(1, 2, 3), hash_key(-1)] == GOLDEN_KEYS
    assert permute(np.arange(8), 8, 42).tolist() == GOLDEN_ORDER


def test_keys_follow_splitmix64_in_plain_integers() -> None:
    """An independent formula with Python's own integers."""
    word = 2**64 - 1
    state = 0x243F6A8885A308D3
    for value in (17, 2**63, 5):
        z = (state * 0x9E3779B97F4A7C15 + value + 1) & word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        state = z ^ (z >> 31)
    assert hash_key(17, 2**63, 5) == state


def test_keys_depend_on_order_and_number_of_values() -> None:
    keys = [hash_key(*v) for n in range(4) for v in itertools.product(range(6), repeat=n)]
    assert len(set(keys)) == len(keys)


def test_extending_a_key_is_mixing_one_value_more() -> None:
    before = np.asarray([hash_key(1, d) for d in range(5)], np.uint64)
    extended = extend_key(before, np.arange(5, dtype=np.uint64))
    assert extended.tolist() == [hash_key(1, d, d) for d in range(5)]


def test_shuffled_is_an_order_that_the_key_decides() -> None:
    orders = [tuple(shuffled_indices(50, key)) for key in range(100)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 100
    assert orders[3] == tuple(shuffled_indices(50, 3))
