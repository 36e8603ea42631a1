"""A pool cut into groups of samples that are alike, with what COINCIDE asks of each group.

Lee et al. 2024, "Concept-skill Transferability-based Data Selection for Large Vision-Language Models" (COINCIDE, arXiv
2406.10995). Features are spread over ranks as the candidates are; no rank holds them all. Clustering sums centres over
ranks; then every cluster's features go to one rank, which orders its members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.signals.hidden import unit
from dataflex_mega.types import ClusterSpec

ROWS = 4096  # rows of features that are compared with all centres at once
SAME = 1e-9  # distances of kernel means that differ by less are the same
PER_CLUSTER, MOST = 20, 10_000  # samples of a cluster and number of clusters, where none is given


@dataclass(frozen=True)
class Ranks:
    """How ranks talk, as two functions."""

    rank: int
    ranks: int
    total: Callable[[Tensor], Tensor]  # sums a tensor over ranks
    exchange: Callable[[Tensor, list[int]], tuple[Tensor, list[int]]]  # see distributed.Collectives.exchange
    device: torch.device | str = "cpu"  # where features are compared with centres


def wanted_clusters(spec: ClusterSpec, samples: int) -> int:
    """How many clusters are begun with, at most one a sample."""
    return min(samples, spec.clusters or min(MOST, -(-samples // PER_CLUSTER)))


# Not kmeans.cluster: centres begin elsewhere there and an empty one starts anew; with it COINCIDE's choices would change.
def kmeans(features: Tensor, first: int, samples: int, spec: ClusterSpec, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Spherical k-means (Dhillon and Modha 2001), until nothing moves or for `spec.iterations`.

    Args:
        features: [n, D] float32 unit vectors of this rank's share, which begins at global place `first`.
        samples: N, over all ranks.

    Returns:
        ([n] int64 clusters of this rank's samples, [K, D] float32 unit centres). Centres begin at samples that `spec.seed`
        picks; one that loses all its members stays where it is.
    """
    count = wanted_clusters(spec, samples)
    chosen = np.sort(np.random.default_rng(spec.seed).choice(samples, count, replace=False))
    mine = np.flatnonzero((chosen >= first) & (chosen < first + len(features)))
    centres = torch.zeros(count, features.shape[1])
    centres[torch.from_numpy(mine)] = features[torch.from_numpy(chosen[mine] - first)]
    centres = ranks.total(centres)
    assigned = torch.full((len(features),), -1)
    for _ in range(max(1, spec.iterations)):
        nearest = _nearest(features, centres, ranks.device)
        moved = ranks.total((nearest != assigned).sum())
        assigned = nearest
        if int(moved) == 0:
            break
        sums = torch.zeros(centres.shape, dtype=torch.float64).index_add_(0, assigned, features.double())
        sums = ranks.total(sums)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, unit(sums).float(), centres)
    return _nearest(features, centres, ranks.device), centres


def _nearest(features: Tensor, centres: Tensor, device: torch.device | str) -> Tensor:
    """[n] int64: the centre with the largest cosine, the first of equal ones."""
    there = centres.to(device).T
    parts = [(rows.to(device) @ there).argmax(dim=1).cpu() for rows in features.split(ROWS)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def transferability(centres: Tensor) -> Tensor:
    """[K, D] unit centres -> [K] float64: the mean cosine with the other centres; 0 for a single one."""
    centres = centres.double()
    others = (centres @ centres.sum(0)) - centres.square().sum(1)
    return others / max(1, len(centres) - 1)


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """[n, D], [m, D] unit vectors -> [n, m] exp(-|a - b|^2)."""
    return torch.exp(2 * (a @ b.T) - a.square().sum(1, keepdim=True) - b.square().sum(1))


def order(members: Tensor, single: float = 1.0) -> tuple[Tensor, float]:
    """[n, D] float64 features of a cluster -> ([n] int64 each member's turn, the mean kernel of its pairs or `single`).

    The first m by turn are the greedy choice of m whose kernel mean is nearest to the cluster's (squared maximum mean
    discrepancy), for any m at once: what is chosen early does not depend on how many follow.
    """
    n = len(members)
    columns = torch.cat([kernel(rows, members).sum(dim=1) for rows in members.split(ROWS)])
    density = float((columns.sum() - n) / (n * (n - 1))) if n > 1 else single
    turn = torch.full((n,), -1)
    near, inside, outside = torch.zeros(n, dtype=torch.float64), 0.0, 0.0  # to the chosen; sums over the chosen
    for size in range(1, n + 1):
        gap = (inside + 2 * near + 1) / size**2 - 2 * (outside + columns) / (n * size)
        gap = gap.masked_fill(turn >= 0, torch.inf)
        pick = int(
            (gap <= gap.min() + SAME).nonzero()[0]
        )  # either of two members is as good: not for rounding to decide
        turn[pick] = size - 1
        inside += float(2 * near[pick] + 1)
        outside += float(columns[pick])
        near += kernel(members, members[pick : pick + 1]).squeeze(1)
    return turn, density


def signals(features: Tensor, first: int, samples: int, spec: ClusterSpec, ranks: Ranks) -> dict[str, Tensor]:
    """What each of this rank's samples has of its cluster.

    Args: as `kmeans`.

    Returns:
        "cluster" [n] int64; "turn" [n] int64, its place in the greedy order of the members; "density" and "transfer" [n]
        float64, those of the cluster.
    """
    assigned, centres = kmeans(features, first, samples, spec, ranks)
    sizes = ranks.total(torch.bincount(assigned, minlength=len(centres)))
    transfer = torch.zeros(len(centres), dtype=torch.float64)
    transfer[sizes > 0] = transferability(centres[sizes > 0])
    turn, density = _ordered(features, assigned, first, spec, ranks)
    return {"cluster": assigned, "turn": turn, "density": density, "transfer": transfer[assigned]}


def _ordered(features: Tensor, assigned: Tensor, first: int, spec: ClusterSpec, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """([n] turns, [n] densities) of this rank's samples: cluster c is ordered on rank c mod ranks."""
    owner = assigned % ranks.ranks
    sent = torch.cat([(owner == rank).nonzero().squeeze(1) for rank in range(ranks.ranks)])
    counts = [int((owner == rank).sum()) for rank in range(ranks.ranks)]
    # Numbers up to 2**53 survive as float64 beside the features.
    head = torch.stack([assigned[sent], sent + first], dim=1).double()
    received, came = ranks.exchange(torch.cat([head, features[sent].double()], dim=1), counts)
    answers = torch.zeros(len(received), 2, dtype=torch.float64)
    for places in _groups(received[:, 0].long(), received[:, 1].long()):
        turn, density = order(received[places, 2:], spec.single_density)
        answers[places, 0], answers[places, 1] = turn.double(), density
    back, _ = ranks.exchange(answers, came)
    turns, densities = torch.zeros(len(features), dtype=torch.int64), torch.zeros(len(features), dtype=torch.float64)
    turns[sent], densities[sent] = back[:, 0].long(), back[:, 1]
    return turns, densities


def _groups(cluster: Tensor, place: Tensor) -> Iterator[Tensor]:
    """Rows of each cluster, in the order of their global places whatever rank they came from."""
    ordered = place.argsort(stable=True)
    ordered = ordered[cluster[ordered].argsort(stable=True)]
    _, counts = cluster[ordered].unique_consecutive(return_counts=True)
    yield from ordered.split(counts.tolist()) if len(ordered) else ()
