"""Clusters of similar samples, and what COINCIDE needs to know of each cluster.

Lee et al. 2024, "Concept-skill Transferability-based Data Selection for Large Vision-Language Models" (COINCIDE, arXiv
2406.10995). Features are sharded over ranks as the candidates are; no rank holds them all. Clustering sums centres over
ranks; then every cluster's features go to one rank, which orders its members.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.signals.sample_embeddings import l2_normalize
from dataflex_mega.types import ClusterSpec

CHUNK_ROWS = 4096  # rows of features that are compared with all centres at once
TIE_TOLERANCE = 1e-9  # kernel-mean distances that differ by less count as equal
SAMPLES_PER_CLUSTER, MAX_CLUSTERS = 20, 10_000  # for a spec without a number of clusters


def num_clusters(spec: ClusterSpec, num_samples: int) -> int:
    """The initial number of clusters, at most one per sample."""
    return min(num_samples, spec.num_clusters or min(MAX_CLUSTERS, -(-num_samples // SAMPLES_PER_CLUSTER)))


# Not kmeans.fit_kmeans: its centres begin elsewhere and an empty one starts anew, which would change COINCIDE's selection.
def fit_spherical_kmeans(
    features: Tensor, first: int, num_samples: int, spec: ClusterSpec, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    """Spherical k-means (Dhillon and Modha 2001), until no sample moves or for `spec.iterations`.

    Args:
        features: [n, D] float32 unit vectors of this rank's share, which begins at global position `first`.
        num_samples: N, over all ranks.

    Returns:
        ([n] int64 clusters of this rank's samples, [K, D] float32 unit centres). Centres begin at samples that `spec.seed`
        picks; one that loses all its members stays where it is.
    """
    count = num_clusters(spec, num_samples)
    seeds = np.sort(np.random.default_rng(spec.seed).choice(num_samples, count, replace=False))
    local = np.flatnonzero((seeds >= first) & (seeds < first + len(features)))
    centres = torch.zeros(count, features.shape[1])
    centres[torch.from_numpy(local)] = features[torch.from_numpy(seeds[local] - first)]
    centres = collectives.all_reduce_sum(centres)
    labels = torch.full((len(features),), -1)
    for _ in range(max(1, spec.iterations)):
        nearest = _nearest(features, centres, collectives.parallel_info.device)
        num_moved = collectives.all_reduce_sum((nearest != labels).sum())
        labels = nearest
        if int(num_moved) == 0:
            break
        sums = torch.zeros(centres.shape, dtype=torch.float64).index_add_(0, labels, features.double())
        sums = collectives.all_reduce_sum(sums)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, l2_normalize(sums).float(), centres)
    return _nearest(features, centres, collectives.parallel_info.device), centres


def _nearest(features: Tensor, centres: Tensor, device: torch.device | str) -> Tensor:
    """[n] int64: the centre with the largest cosine, the first of equal ones."""
    columns = centres.to(device).T
    nearest = [(rows.to(device) @ columns).argmax(dim=1).cpu() for rows in features.split(CHUNK_ROWS)]
    return torch.cat(nearest) if nearest else torch.zeros(0, dtype=torch.int64)


def transferability(centres: Tensor) -> Tensor:
    """[K, D] unit centres -> [K] float64: the mean cosine with the other centres; 0 for a single one."""
    centres = centres.double()
    others = (centres @ centres.sum(0)) - centres.square().sum(1)
    return others / max(1, len(centres) - 1)


def rbf_kernel(a: Tensor, b: Tensor) -> Tensor:
    """[n, D], [m, D] unit vectors -> [n, m] exp(-|a - b|^2)."""
    return torch.exp(2 * (a @ b.T) - a.square().sum(1, keepdim=True) - b.square().sum(1))


def kernel_mean_order(members: Tensor, singleton_density: float = 1.0) -> tuple[Tensor, float]:
    """[n, D] float64 features of a cluster -> ([n] int64 each member's number in the order, the cluster's density).

    The first m in the order are the greedy choice of m whose kernel mean is nearest to the cluster's (squared maximum mean
    discrepancy), for any m at once: what is chosen early does not depend on how many follow. The density is the mean kernel
    of all pairs, `singleton_density` where there is none.
    """
    n = len(members)
    kernel_sums = torch.cat([rbf_kernel(rows, members).sum(dim=1) for rows in members.split(CHUNK_ROWS)])
    density = float((kernel_sums.sum() - n) / (n * (n - 1))) if n > 1 else singleton_density
    order = torch.full((n,), -1)
    to_chosen = torch.zeros(n, dtype=torch.float64)  # sum of each member's kernels with the chosen ones
    within_chosen, chosen_to_all = 0.0, 0.0  # sums over the chosen ones
    for size in range(1, n + 1):
        gap = (within_chosen + 2 * to_chosen + 1) / size**2 - 2 * (chosen_to_all + kernel_sums) / (n * size)
        gap = gap.masked_fill(order >= 0, torch.inf)
        # The first of equally good members: rounding must not decide.
        pick = int((gap <= gap.min() + TIE_TOLERANCE).nonzero()[0])
        order[pick] = size - 1
        within_chosen += float(2 * to_chosen[pick] + 1)
        chosen_to_all += float(kernel_sums[pick])
        to_chosen += rbf_kernel(members, members[pick : pick + 1]).squeeze(1)
    return order, density


def cluster_signals(
    features: Tensor, first: int, num_samples: int, spec: ClusterSpec, collectives: Collectives
) -> dict[str, Tensor]:
    """What this rank's samples know of their clusters. Every rank must call it.

    Args: as `fit_spherical_kmeans`.

    Returns:
        "cluster" [n] int64; "order" [n] int64, its number in the greedy order of the members; "density" and
        "transferability" [n] float64, those of the cluster.
    """
    labels, centres = fit_spherical_kmeans(features, first, num_samples, spec, collectives)
    sizes = collectives.all_reduce_sum(torch.bincount(labels, minlength=len(centres)))
    of_cluster = torch.zeros(len(centres), dtype=torch.float64)
    of_cluster[sizes > 0] = transferability(centres[sizes > 0])
    order, density = _order_members(features, labels, first, spec, collectives)
    return {"cluster": labels, "order": order, "density": density, "transferability": of_cluster[labels]}


def _order_members(
    features: Tensor, labels: Tensor, first: int, spec: ClusterSpec, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    """([n] order, [n] density) of this rank's samples: cluster c is ordered on rank c mod the number of ranks."""
    owner = labels % collectives.parallel_info.dp_size
    sent = torch.cat([(owner == rank).nonzero().squeeze(1) for rank in range(collectives.parallel_info.dp_size)])
    send_counts = [int((owner == rank).sum()) for rank in range(collectives.parallel_info.dp_size)]
    # Numbers up to 2**53 survive as float64 beside the features.
    head = torch.stack([labels[sent], sent + first], dim=1).double()
    received, receive_counts = collectives.all_to_all(torch.cat([head, features[sent].double()], dim=1), send_counts)
    answers = torch.zeros(len(received), 2, dtype=torch.float64)
    for rows in _rows_by_cluster(received[:, 0].long(), received[:, 1].long()):
        order, density = kernel_mean_order(received[rows, 2:], spec.singleton_density)
        answers[rows, 0], answers[rows, 1] = order.double(), density
    returned, _ = collectives.all_to_all(answers, receive_counts)
    orders, densities = torch.zeros(len(features), dtype=torch.int64), torch.zeros(len(features), dtype=torch.float64)
    orders[sent], densities[sent] = returned[:, 0].long(), returned[:, 1]
    return orders, densities


def _rows_by_cluster(labels: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Row indices of each cluster, by the rows' global positions whatever rank they came from."""
    rows = positions.argsort(stable=True)
    rows = rows[labels[rows].argsort(stable=True)]
    _, counts = labels[rows].unique_consecutive(return_counts=True)
    yield from rows.split(counts.tolist()) if len(rows) else ()
