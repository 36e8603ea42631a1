"""k-means over rows that are divided over ranks: each rank keeps its rows, and centres, sums and counts travel.

Lloyd's algorithm, plain or spherical (rows and centres of length 1, nearest by angle: Dhillon and Modha 2001). One round
costs n k d products on each rank and one sum over ranks of [k, d]. The result does not depend on the number of ranks, up to
rounding of float64 sums: centres start at rows drawn by global position, and a centre that has lost all rows starts anew at
the row farthest from its own, the lowest position where rows are equally far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

CHUNK = 1 << 22  # distances in memory at once

Method = Literal["kmeans", "spherical_kmeans", "random"]


class Ranks(Protocol):
    """What is needed of distributed.Collectives."""

    def sum(self, values: Tensor) -> Tensor: ...
    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor: ...


@dataclass(frozen=True)
class Divided:
    """[n, d] float32 rows of this rank, the ranks' shares following each other."""

    rows: Tensor
    counts: list[int]  # rows of each rank
    rank: int

    @property
    def first(self) -> int:
        """The global position of the first row here."""
        return sum(self.counts[: self.rank])

    def at(self, positions: Tensor, ranks: Ranks) -> Tensor:
        """[k] global positions, the same on all ranks -> [k, d] their rows, on all ranks."""
        here = positions - self.first
        mine = (here >= 0) & (here < len(self.rows))
        found = torch.zeros(len(positions), self.rows.shape[1], dtype=torch.float64)
        found[mine] = self.rows[here[mine]].double()
        return ranks.sum(found).float()


# Not clusters.kmeans: centres begin elsewhere there and an empty one stays; with it what is chosen would change.
def cluster(data: Divided, k: int, iterations: int, seed: int, method: Method, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """-> ([n] int64 cluster of each row here, [n] float32 its squared distance to the centre). At most k clusters are used.

    `random`: clusters of equal size in a random order, against which the others are to be compared.
    """
    total = sum(data.counts)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    if method == "random":
        place = torch.empty_like(order).scatter_(0, order, torch.arange(total))
        own = place[data.first : data.first + len(data.rows)] % k
        return own, torch.zeros(len(data.rows))
    spherical = method == "spherical_kmeans"
    if spherical:
        data = Divided(_unit(data.rows), data.counts, data.rank)
    centres = data.at(order[:k], ranks)
    for _ in range(iterations):
        own, far = assign(data.rows, centres)
        moved = _means(data, own, far, centres, ranks)
        moved = _unit(moved) if spherical else moved
        if torch.equal(moved, centres):
            break
        centres = moved
    return assign(data.rows, centres)


def assign(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """[n, d] rows, [k, d] centres -> ([n] the nearest, the first where several are, [n] its squared distance)."""
    own, far = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows))
    half = centres.square().sum(1) / 2
    for first in range(0, len(rows), max(1, CHUNK // len(centres))):
        part = slice(first, first + max(1, CHUNK // len(centres)))
        best = (half - rows[part] @ centres.t()).min(dim=1)  # half the squared distance, the row's own length left out
        own[part] = best.indices
        far[part] = (2 * best.values + rows[part].square().sum(1)).clamp(min=0)
    return own, far


def _means(data: Divided, own: Tensor, far: Tensor, centres: Tensor, ranks: Ranks) -> Tensor:
    """[k, d] the mean row of each cluster; for one without rows, a row that is far from its own centre."""
    k = len(centres)
    sums = torch.zeros(k, centres.shape[1] + 1, dtype=torch.float64)
    sums[:, :-1].index_add_(0, own, data.rows.double())
    sums[:, -1] += torch.bincount(own, minlength=k)
    sums = ranks.sum(sums)
    counts = sums[:, -1:]
    means = (sums[:, :-1] / counts.clamp(min=1)).float()
    empty = (counts[:, 0] == 0).nonzero().squeeze(1)
    if len(empty):
        means[empty] = data.at(_farthest(data, far, len(empty), ranks), ranks)
    return means


def _farthest(data: Divided, far: Tensor, count: int, ranks: Ranks) -> Tensor:
    """[count] global positions of the rows farthest from their centres, the lower one where they are equally far."""
    order = far.sort(descending=True, stable=True).indices[:count]
    mine = torch.stack([far[order].double(), (order + data.first).double()], dim=1)
    every = ranks.gather_uneven(mine, [min(count, each) for each in data.counts])
    every = every[every[:, 1].sort(stable=True).indices]
    return every[every[:, 0].sort(descending=True, stable=True).indices][:count, 1].long()


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return torch.where(length > 0, rows / length, 0.0)


Strategy = Literal["random", "nearest", "farthest", "mixed"]


def representatives(own: Tensor, far: Tensor, count: int, strategy: Strategy, rng: torch.Generator) -> Tensor:
    """[N] clusters and distances of all rows -> [m] positions, ascending: up to `count` of each cluster.

    `nearest` and `farthest` go by the distance to the centre, `mixed` takes one half near (rounded up) and the rest at
    random, `random` all at random. Lower positions first where distances are equal.
    """
    key = {"nearest": far, "farthest": -far}.get(strategy)
    if key is None:
        key = torch.rand(len(own), generator=rng)
    if strategy == "mixed":
        key[_first_of_each(own, far, -(-count // 2))] = -1.0  # before all others
    return _first_of_each(own, key, count).sort().values


def _first_of_each(own: Tensor, key: Tensor, count: int) -> Tensor:
    """[m] positions of the `count` lowest keys of each cluster."""
    order = key.sort(stable=True).indices
    order = order[own[order].sort(stable=True).indices]
    sorted_own = own[order]
    begins = torch.searchsorted(sorted_own, sorted_own)
    return order[torch.arange(len(order)) - begins < count]
