"""COINCIDE's proportions and counts against golden numbers and a count in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dataflex_mega.algorithms.selectors.coincide import Coincide, allocate_counts
from dataflex_mega.errors import ConfigError, DataError
from tests.unit.algorithms.examples import generator, table, update_context

TRANSFER = [0.1503602284, 0.2210709065, 0.0707106781]
DENSITY = [0.8244299239, 0.9231163464, 1.0]
SHARES = [0.3386268134, 0.358525957, 0.3028472297]
SIZES = [3, 2, 1]


def scores(turns: list[int]) -> torch.Tensor:
    """Of six samples in three clusters, with these turns."""
    cluster = [0, 0, 0, 1, 1, 2]
    return torch.tensor([[c, t, DENSITY[c], TRANSFER[c]] for c, t in zip(cluster, turns, strict=True)])


def test_golden_shares() -> None:
    found = torch.softmax(torch.tensor(TRANSFER).double() / torch.tensor(DENSITY), 0)
    assert found.tolist() == pytest.approx(SHARES, abs=1e-7)


@pytest.mark.parametrize(
    ("count", "expected"), [(4, [1, 2, 1]), (5, [2, 2, 1]), (6, [3, 2, 1]), (1, [0, 1, 0]), (0, [0, 0, 0])]
)
def test_golden_counts(count: int, expected: list[int]) -> None:
    assert allocate_counts(torch.tensor(SHARES), torch.tensor(SIZES), count).tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_whole_fill_no_cluster_twice_and_sum_to_the_count(seed: int) -> None:
    rng = generator(seed)
    sizes = torch.randint(1, 9, (12,), generator=rng)
    shares = torch.softmax(6 * torch.randn(12, generator=rng, dtype=torch.float64), 0)
    for count in (1, int(sizes.sum()) // 2, int(sizes.sum())):
        found = allocate_counts(shares, sizes, count)
        assert int(found.sum()) == count and bool((found >= 0).all()) and bool((found <= sizes).all())
        free = found < sizes  # of two clusters that are not full, the one with the larger share gets no less
        order = shares[free].sort(descending=True).indices
        assert found[free][order].tolist() == sorted(found[free].tolist(), reverse=True)


def test_members_are_taken_by_their_turns() -> None:
    select = Coincide().select
    assert select(scores([1, 0, 2, 0, 1, 0]), 4, update_context(), generator()).tolist() == [1, 3, 4, 5]
    assert select(scores([2, 1, 0, 1, 0, 0]), 5, update_context(), generator()).tolist() == [1, 2, 3, 4, 5]


def test_a_large_temperature_evens_the_clusters_out() -> None:
    found = table(frozenset({"clusters"}))
    even = Coincide(temperature=1e9).select(Coincide().score(found), 16, update_context(), generator())
    assert torch.bincount(even // 10, minlength=8).tolist() == [2] * 8
    sharp = Coincide(temperature=0.01).select(Coincide().score(found), 16, update_context(), generator())
    assert int(torch.bincount(sharp // 10).max()) == 10


def test_with_a_mixer_a_cluster_gives_what_it_has_of_the_domain() -> None:
    part = scores([1, 0, 2, 0, 1, 0])[[0, 2, 4]]
    assert Coincide().select(part, 2, update_context(), generator()).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"single_member_density": math.inf}, "single_member_density"),
        ({"num_clusters": 0}, "num_clusters"),
        ({"clustering_max_iter": 0}, "clustering_max_iter"),
        ({"embedding_layers": [1, 1]}, "embedding_layers"),
        ({"embedding_layers": []}, "embedding_layers"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"selector\.coincide\.{key}: .*found"):
        Coincide(**parameters)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match="7 samples wanted, 6 candidates"):
        Coincide().select(scores([0] * 6), 7, update_context(), generator())
