"""COINCIDE: more samples from clusters that are similar to others and spread out, and representative ones of each.

Lee et al. 2024, "Concept-skill Transferability-based Data Selection for Large Vision-Language Models" (arXiv 2406.10995).
Samples are clustered by hidden states of several layers. With S the mean cosine of a cluster's centre with the other
centres and D the mean of exp(-|u - v|^2) over pairs of its members, its share of the selection is

    P proportional to exp(S / (temperature D))

and inside a cluster the members are taken greedily so that their kernel mean stays nearest to the cluster's. The paper's
features are of image and text tokens; here a sample's features are of all its tokens, the text-only form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Distinct, Range, Selector
from dataflex_mega.algorithms.requests import ClusterSignal, Request
from dataflex_mega.errors import DataError
from dataflex_mega.types import ClusterSpec, SignalTable, UpdateContext

CLUSTER, ORDER, DENSITY, TRANSFERABILITY = range(4)  # columns of the scores


def allocate_counts(proportions: Tensor, sizes: Tensor, count: int) -> Tensor:
    """[K] proportions that sum to 1, [K] sizes -> [K] int64 that sum to `count`, none above its size.

    Largest remainders; what a full cluster cannot take goes to the others in proportion. `count` <= sum of sizes.
    """
    counts = torch.zeros_like(sizes)
    while (unallocated := count - int(counts.sum())) > 0:
        is_open = counts < sizes
        total = proportions[is_open].sum()
        weights = torch.where(is_open, proportions / total if float(total) > 0 else 1 / is_open.sum(), 0.0)
        exact = weights * unallocated
        whole = exact.floor().long()
        by_remainder = (exact - whole).masked_fill(~is_open, -1.0).sort(descending=True, stable=True).indices
        whole[by_remainder[: unallocated - int(whole.sum())]] += 1
        counts = torch.minimum(counts + whole, sizes)
    return counts


@dataclass
class Coincide(Selector):
    """Clusters by transferability and density, members by their kernel mean.

    Args:
        mode: "text": one feature, of all tokens; "image_text": one of the image tokens beside one of the text tokens, as in
            the paper; "auto": the second where the datasets have images.
        embedding_layers: hidden states as transformers counts them; None: five, evenly spaced from the first layer to the
            last. With `engine: megatron` only [-1] is available.
        num_clusters: None: one for every 20 candidates, at most 10000.
        clustering_max_iter: iterations of k-means, which ends earlier when no sample moves. >= 1.
        temperature: > 0; large gives the clusters equal shares.
        single_member_density: D of a cluster with one member, > 0.
        seed: of the initial centres.
    """

    mode: Literal["auto", "text", "image_text"] = "auto"
    embedding_layers: Annotated[list[int] | None, Distinct()] = None
    num_clusters: Annotated[int | None, Range(ge=1)] = None
    clustering_max_iter: Annotated[int, Range(ge=1)] = 10
    temperature: Annotated[float, Range(gt=0)] = 1.0
    single_member_density: Annotated[float, Range(gt=0)] = 1.0
    seed: Annotated[int, Range(ge=0)] = 42

    def requests(self) -> tuple[Request, ...]:
        layers = None if self.embedding_layers is None else tuple(self.embedding_layers)
        spec = ClusterSpec(
            layers, self.num_clusters, self.seed, self.clustering_max_iter, self.single_member_density, self.mode
        )
        return (ClusterSignal(spec),)

    def score(self, table: SignalTable) -> Tensor:
        """[n, 4] float32: cluster, position in it, its density, its transferability. Integers are exact below 2**24."""
        return torch.stack([table[name].float() for name in ("cluster", "order", "density", "transferability")], dim=1)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions in ascending order. Raises DataError when there are fewer candidates."""
        if count > len(scores):
            raise DataError(f"selector.coincide: {count} samples wanted, {len(scores)} candidates are there")
        cluster_ids, clusters, sizes = scores[:, CLUSTER].long().unique(return_inverse=True, return_counts=True)
        density, transferability = torch.zeros(2, len(cluster_ids), dtype=torch.float64)
        density[clusters] = scores[:, DENSITY].double()  # equal for all members
        transferability[clusters] = scores[:, TRANSFERABILITY].double()
        proportions = torch.softmax(transferability / (self.temperature * density), dim=0)
        counts = allocate_counts(proportions, sizes, count)
        # Candidates by cluster, then by their order in it; with a mixer a cluster may lack members of other domains.
        ordered = scores[:, ORDER].sort(stable=True).indices
        ordered = ordered[clusters[ordered].sort(stable=True).indices]
        starts = sizes.cumsum(0) - sizes
        position = torch.arange(len(scores)) - starts[clusters[ordered]]
        return ordered[position < counts[clusters[ordered]]].sort().values
