"""k-means over sharded rows against Lloyd's algorithm written out in NumPy; representatives by their distances."""

import threading

import numpy as np
import pytest
import torch

from dataflex_mega.signals.kmeans import ShardedRows, assign, choose_representatives, fit_kmeans


class Threads:
    """Ranks as threads: every collective waits for all of them."""

    def __init__(self, world):
        self.barrier, self.sent = threading.Barrier(world), [None] * world

    def of(self, rank):
        return Rank(self, rank)


class Rank:
    def __init__(self, threads, rank):
        self.threads, self.rank = threads, rank

    def _all(self, values):
        self.threads.sent[self.rank] = values.clone()
        self.threads.barrier.wait()
        values = list(self.threads.sent)
        self.threads.barrier.wait()
        return values

    def all_reduce_sum(self, values):
        return torch.stack(self._all(values)).sum(0)

    def all_gather_uneven(self, rows, counts):
        assert len(rows) == counts[self.rank]
        return torch.cat(self._all(rows))


def fit_on_ranks(rows, counts, *arguments):
    """`cluster` on len(counts) ranks -> ([N] clusters, [N] distances)."""
    threads, results = Threads(len(counts)), [None] * len(counts)

    def work(rank):
        first = sum(counts[:rank])
        data = ShardedRows(rows[first : first + counts[rank]], counts, rank)
        results[rank] = fit_kmeans(data, *arguments, threads.of(rank))

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(len(counts))]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(30)
    return tuple(torch.cat([result[output] for result in results]) for output in (0, 1))


def blobs(count=60, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, 8)) * 4
    return torch.from_numpy((centres[np.arange(count) % 5] + rng.normal(size=(count, 8)) * 0.5).astype(np.float32))


def lloyd(rows, k, rounds, seed):
    """The definition; None for a start from which a cluster becomes empty."""
    rows = rows.double().numpy()
    centres = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:k].numpy()]
    for _ in range(rounds):
        labels = ((rows[:, None] - centres[None]) ** 2).sum(2).argmin(1)
        if len(set(labels.tolist())) < k:
            return None
        centres = np.stack([rows[labels == c].mean(0) for c in range(k)])
    distance = ((rows[:, None] - centres[None]) ** 2).sum(2)
    return distance.argmin(1), distance.min(1)


@pytest.mark.parametrize("counts", [[60], [31, 0, 29], [15, 15, 15, 15]])
def test_lloyds_algorithm_on_any_number_of_ranks(counts):
    seed, (expected, expected_distances) = next((s, f) for s in range(99) if (f := lloyd(blobs(), 7, 4, s)) is not None)
    labels, distances = fit_on_ranks(blobs(), counts, 7, 4, seed, "kmeans")
    assert labels.tolist() == expected.tolist()
    np.testing.assert_allclose(distances.numpy(), expected_distances, rtol=1e-4, atol=1e-4)


def test_separate_groups_are_found():
    labels, _ = fit_on_ranks(blobs(), [30, 30], 5, 20, 5, "kmeans")
    groups = [set(labels[g::5].tolist()) for g in range(5)]
    assert sum(len(group) == 1 for group in groups) >= 3


def test_a_cluster_that_lost_its_rows_starts_at_the_farthest_row():
    """Two centres on equal rows: the second gets nothing, since the first is as near; then it moves to the outlier."""
    rows = torch.tensor([[0.0, 0.0]] * 6 + [[9.0, 0.0]])
    seed = next(s for s in range(50) if 6 not in torch.randperm(7, generator=torch.Generator().manual_seed(s))[:2])
    for counts in ([7], [3, 4]):
        labels, distances = fit_on_ranks(rows, counts, 2, 5, seed, "kmeans")
        assert len(set(labels[:6].tolist())) == 1 and labels[6] != labels[0]
        assert distances.max() == 0


def test_spherical_goes_by_angle_and_random_by_nothing():
    rows = torch.tensor([[1.0, 0.0], [100.0, 1.0], [0.0, 1.0], [0.5, 50.0]])
    for seed in range(6):
        labels, distances = fit_on_ranks(rows, [2, 2], 2, 10, seed, "spherical_kmeans")
        if labels[0] != labels[2]:
            assert labels[0] == labels[1] and labels[2] == labels[3] and distances.max() < 0.1
    labels, _ = fit_on_ranks(blobs(), [20, 40], 7, 10, 1, "random")
    other_labels, _ = fit_on_ranks(blobs(seed=9), [60], 7, 10, 1, "random")
    assert torch.equal(labels, other_labels) and set(torch.bincount(labels).tolist()) <= {8, 9}


def test_assignment_in_pieces_is_the_same(monkeypatch):
    from dataflex_mega.signals import kmeans

    rows, centres = blobs(), blobs(7, seed=2)
    whole = assign(rows, centres)
    monkeypatch.setattr(kmeans, "CHUNK", 20)
    for first, second in zip(whole, assign(rows, centres), strict=True):
        torch.testing.assert_close(first, second)


LABELS = torch.tensor([0, 1, 0, 1, 0, 2, 0, 1])
DISTANCES = torch.tensor([5.0, 1.0, 2.0, 3.0, 2.0, 7.0, 9.0, 2.0])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_representatives_by_distance():
    assert choose_representatives(LABELS, DISTANCES, 2, "nearest", rng()).tolist() == [1, 2, 4, 5, 7]
    assert choose_representatives(LABELS, DISTANCES, 2, "farthest", rng()).tolist() == [0, 3, 5, 6, 7]
    assert choose_representatives(LABELS, DISTANCES, 99, "random", rng()).tolist() == list(range(8))


@pytest.mark.parametrize("strategy", ["random", "mixed"])
def test_random_representatives_are_members_and_change_with_the_generator(strategy):
    labels, distances = torch.arange(90) % 6, torch.rand(90, generator=rng(4))
    representatives = [choose_representatives(labels, distances, 3, strategy, rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(representatives[0], representatives[1]) and not torch.equal(
        representatives[0], representatives[2]
    )
    assert torch.bincount(labels[representatives[0]]).tolist() == [3] * 6
    nearest = set(choose_representatives(labels, distances, 2, "nearest", rng()).tolist())
    assert (strategy == "mixed") == (
        nearest <= set(representatives[0].tolist()) and nearest <= set(representatives[2].tolist())
    )
