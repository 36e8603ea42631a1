"""Clusters against golden numbers, and equal on one, two and three ranks."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.signals.clusters import (
    cluster_signals,
    fit_spherical_kmeans,
    kernel_mean_order,
    num_clusters,
    rbf_kernel,
    transferability,
)
from dataflex_mega.types import ClusterSpec

FEATURES = torch.tensor(
    [[1, 0, 0], [0.96, 0.28, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0.96, 0.28], [0, 0, 1]], dtype=torch.float64
)


def collectives(rank, dp_size, all_reduce_sum, all_to_all):
    info = SimpleNamespace(dp_rank=rank, dp_size=dp_size, device="cpu")
    return SimpleNamespace(parallel_info=info, all_reduce_sum=all_reduce_sum, all_to_all=all_to_all)


ALONE = collectives(0, 1, lambda v: v, lambda rows, counts: (rows, counts))


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, count):
        self.count, self.barrier, self.box = count, threading.Barrier(count), [None] * count

    def swap(self, rank, value):
        """What every rank gave."""
        self.box[rank] = value
        self.barrier.wait(20)
        values = list(self.box)
        self.barrier.wait(20)
        return values

    def all_to_all(self, rank, rows, counts):
        sent = self.swap(rank, rows.split(counts))
        received = [rows_of_rank[rank] for rows_of_rank in sent]
        return torch.cat(received), [len(rows_of_rank) for rows_of_rank in received]

    def run(self, work):
        """work(ranks) on each -> results in rank order."""
        results = [None] * self.count

        def run_rank(rank):
            rank_collectives = collectives(
                rank,
                self.count,
                lambda v: torch.stack(self.swap(rank, v)).sum(0),
                lambda r, c: self.all_to_all(rank, r, c),
            )
            results[rank] = work(rank_collectives)

        threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_golden_transferability_and_densities():
    centres = F.normalize(torch.stack([FEATURES[:3].sum(0), FEATURES[3:5].sum(0), FEATURES[5]]))
    assert transferability(centres).tolist() == pytest.approx([0.1503602284, 0.2210709065, 0.0707106781], abs=1e-9)
    densities = [kernel_mean_order(part)[1] for part in FEATURES.split([3, 2, 1])]
    assert densities == pytest.approx([0.8244299239, 0.9231163464, 1.0], abs=1e-9)
    assert kernel_mean_order(FEATURES[5:], singleton_density=0.5)[1] == 0.5 and transferability(
        centres[:1]
    ).tolist() == [0.0]


def test_golden_greedy_order():
    order, _ = kernel_mean_order(FEATURES[:3])
    assert order.tolist() == [2, 0, 1]
    kernel_sums = rbf_kernel(FEATURES[:3], FEATURES[:3]).sum(1)
    assert (1 - 2 * kernel_sums / 3).tolist() == pytest.approx([-0.7289575949, -0.8686464837, -0.7001156168], abs=1e-9)


def test_the_greedy_choice_is_the_best_next_one_by_the_distance_of_kernel_means():
    members = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    grams = rbf_kernel(members, members)

    def distance(chosen):
        rows = list(chosen)
        return float(grams[rows][:, rows].mean() - 2 * grams[rows].mean() + grams.mean())

    order, density = kernel_mean_order(members)
    taken = []
    for pick in order.argsort().tolist():
        best = min(distance([*taken, other]) for other in set(range(9)) - set(taken))
        assert distance([*taken, pick]) == pytest.approx(best, abs=1e-12)
        taken.append(pick)
    pairs = [float(grams[a, b]) for a, b in itertools.combinations(range(9), 2)]
    assert density == pytest.approx(sum(pairs) / len(pairs))


def test_of_members_that_are_as_good_the_first_is_taken():
    """Two members are symmetric; without a tolerance rounding would put the second one first now and then."""
    for seed in range(50):
        pair = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert kernel_mean_order(F.normalize(pair))[0].tolist() == [0, 1]


def blobs(count, per):
    generator = torch.Generator().manual_seed(1)
    middles = F.normalize(torch.randn(count, 8, generator=generator))
    noise = torch.randn(count * per, 8, generator=generator) * 0.02
    shuffled = torch.randperm(count * per, generator=generator)
    return F.normalize(middles.repeat_interleave(per, 0) + noise)[shuffled], shuffled // per


def test_well_apart_groups_are_found():
    features, truth = blobs(3, 30)
    labels = min(
        (fit_spherical_kmeans(features, 0, 90, ClusterSpec(None, 3, seed), ALONE) for seed in range(5)),
        key=lambda pair: -float((features * pair[1][pair[0]]).sum()),
    )[0]
    assert len({(a, b) for a, b in zip(labels.tolist(), truth.tolist(), strict=True)}) == 3


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_on_any_number_of_ranks(ranks):
    features, _ = blobs(4, 25)
    spec = ClusterSpec(None, 7, 3, 20)
    whole = cluster_signals(features, 0, 100, spec, ALONE)
    cuts = [0, 13, 100] if ranks == 2 else [0, 40, 40, 100]  # one rank may have nothing
    shards = Threads(ranks).run(
        lambda rank_collectives: cluster_signals(
            features[slice(*cuts[rank_collectives.parallel_info.dp_rank :][:2])],
            cuts[rank_collectives.parallel_info.dp_rank],
            100,
            spec,
            rank_collectives,
        )
    )
    for name, expected in whole.items():
        actual = torch.cat([shard[name] for shard in shards])
        if expected.dtype == torch.int64:
            assert torch.equal(actual, expected), name
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    for cluster in whole["cluster"].unique():
        orders = whole["order"][whole["cluster"] == cluster]
        assert sorted(orders.tolist()) == list(range(len(orders)))


def test_how_many_clusters():
    assert [num_clusters(ClusterSpec(None, None), n) for n in (1, 20, 21, 1_000_000)] == [1, 1, 2, 10_000]
    assert num_clusters(ClusterSpec(None, 50), 7) == 7
