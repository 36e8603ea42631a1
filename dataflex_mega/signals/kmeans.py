"""k-means over rows that are sharded over ranks: each rank keeps its rows; only centres, sums and counts are exchanged.

Lloyd's algorithm, plain or spherical (rows and centres of length 1, nearest by angle: Dhillon and Modha 2001). One round
costs n k d products on each rank and one sum over ranks of [k, d]. The result does not depend on the number of ranks, up to
rounding of float64 sums: centres start at rows drawn by global position, and a centre that has lost all rows starts anew at
the row farthest from its own centre, the lowest position where rows are equally far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.signals.sample_embeddings import l2_normalize

CHUNK = 1 << 22  # distances in memory at once

Method = Literal["kmeans", "spherical_kmeans", "random"]


@dataclass(frozen=True)
class ShardedRows:
    """[n, d] float32 rows of this rank; global positions count through the ranks' rows in rank order."""

    rows: Tensor
    counts: list[int]  # rows of each rank
    rank: int

    @property
    def first(self) -> int:
        """The global position of this rank's first row."""
        return sum(self.counts[: self.rank])

    def rows_at(self, positions: Tensor, collectives: Collectives) -> Tensor:
        """[k] global positions, the same on all ranks -> [k, d] their rows, on all ranks."""
        local = positions - self.first
        is_local = (local >= 0) & (local < len(self.rows))
        rows = torch.zeros(len(positions), self.rows.shape[1], dtype=torch.float64)
        rows[is_local] = self.rows[local[is_local]].double()
        return collectives.all_reduce_sum(rows).float()


# Not clusters.fit_spherical_kmeans: its centres begin elsewhere and an empty one stays, which would change what is chosen.
def fit_kmeans(
    data: ShardedRows, k: int, iterations: int, seed: int, method: Method, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    """Cluster the rows of all ranks; at most k clusters are used.

    `random`: clusters of equal size in a random order, a baseline for the others.

    Returns:
        ([n] int64 label of each row of this rank, [n] float32 its squared distance to the centre).
    """
    total = sum(data.counts)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if method == "random":
        position = torch.empty_like(order).scatter_(0, order, torch.arange(total))
        labels = position[data.first : data.first + len(data.rows)] % k
        return labels, torch.zeros(len(data.rows))
    spherical = method == "spherical_kmeans"
    if spherical:
        data = ShardedRows(l2_normalize(data.rows), data.counts, data.rank)
    centres = data.rows_at(order[:k], collectives)
    for _ in range(iterations):
        labels, distances = assign(data.rows, centres)
        means = _means(data, labels, distances, centres, collectives)
        means = l2_normalize(means) if spherical else means
        if torch.equal(means, centres):
            break
        centres = means
    return assign(data.rows, centres)


def assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """[n, d] rows, [k, d] centres -> ([n] the nearest, the first where several are, [n] its squared distance)."""
    labels, distances = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows))
    half = centres.square().sum(1) / 2
    for first in range(0, len(rows), max(1, CHUNK // len(centres))):
        chunk = slice(first, first + max(1, CHUNK // len(centres)))
        # Half the squared distance, without the row's own square, which is the same for all centres.
        nearest = (half - rows[chunk] @ centres.t()).min(dim=1)
        labels[chunk] = nearest.indices
        distances[chunk] = (2 * nearest.values + rows[chunk].square().sum(1)).clamp(min=0)
    return labels, distances


def _means(data: ShardedRows, labels: Tensor, distances: Tensor, centres: Tensor, collectives: Collectives) -> Tensor:
    """[k, d] the mean row of each cluster; for one without rows, a row that is far from its own centre."""
    k = len(centres)
    sums = torch.zeros(k, centres.shape[1] + 1, dtype=torch.float64)
    sums[:, :-1].index_add_(0, labels, data.rows.double())
    sums[:, -1] += torch.bincount(labels, minlength=k)
    sums = collectives.all_reduce_sum(sums)
    counts = sums[:, -1:]
    means = (sums[:, :-1] / counts.clamp(min=1)).float()
    empty = (counts[:, 0] == 0).nonzero().squeeze(1)
    if len(empty):
        means[empty] = data.rows_at(_farthest(data, distances, len(empty), collectives), collectives)
    return means


def _farthest(data: ShardedRows, distances: Tensor, count: int, collectives: Collectives) -> Tensor:
    """[count] global positions of the rows farthest from their centres, the lower one where they are equally far."""
    order = distances.sort(descending=True, stable=True).indices[:count]
    local = torch.stack([distances[order].double(), (order + data.first).double()], dim=1)
    gathered = collectives.all_gather_uneven(local, [min(count, num_rows) for num_rows in data.counts])
    gathered = gathered[gathered[:, 1].sort(stable=True).indices]
    return gathered[gathered[:, 0].sort(descending=True, stable=True).indices][:count, 1].long()


Strategy = Literal["random", "nearest", "farthest", "mixed"]


def choose_representatives(
    labels: Tensor, distances: Tensor, count: int, strategy: Strategy, rng: torch.Generator
) -> Tensor:
    """[N] labels and distances of all rows -> [m] positions, ascending: up to `count` of each cluster.

    `nearest` and `farthest` go by the distance to the centre, `mixed` takes one half near (rounded up) and the rest at
    random, `random` all at random. Lower positions first where distances are equal.
    """
    key = {"nearest": distances, "farthest": -distances}.get(strategy)
    if key is None:
        key = torch.rand(len(labels), generator=rng)
    if strategy == "mixed":
        key[_first_of_each(labels, distances, -(-count // 2))] = -1.0  # before all others
    return _first_of_each(labels, key, count).sort().values


def _first_of_each(labels: Tensor, key: Tensor, count: int) -> Tensor:
    """[m] positions of the `count` lowest keys of each cluster."""
    order = key.sort(stable=True).indices
    order = order[labels[order].sort(stable=True).indices]
    sorted_labels = labels[order]
    begins = torch.searchsorted(sorted_labels, sorted_labels)
    return order[torch.arange(len(order)) - begins < count]
