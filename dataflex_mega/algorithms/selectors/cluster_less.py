"""LESS for pools that are too large to score whole: a few representatives stand for all members of their cluster.

DataFlex's method (arXiv 2603.26164); no other paper has it. Samples are clustered once, by mean hidden states. At every
selection some samples of each cluster are drawn, their gradients are compared with those of the targets as LESS does
(arXiv 2402.04333), and the cluster's score is that of all its members:

    direction   max over sub-tasks s of  cos(sum over representatives r of G_r / |G_r|,  U_s)
    mean        max over sub-tasks s of  mean over representatives r of  <G_r, U_s> / |G_r|

with U_s the mean of the normalised target gradients. With every sample a cluster of its own both are LESS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Range, Selector
from dataflex_mega.algorithms.requests import ClusterGradientSignal, PoolClusterRequest, Request
from dataflex_mega.algorithms.selectors._ranking import max_cosines, select_highest
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Clusters, ProjectionSpec, SignalTable, UpdateContext


@dataclass
class ClusterLess(Selector):
    """The members of the clusters with the highest scores.

    Args:
        gradient_type: "adam" preconditions the representatives' gradients, "sgd" does not.
        cluster_size: mean number of members of a cluster, unless num_clusters is given.
        num_clusters: None: the size of the pool / cluster_size, rounded up.
        samples_per_cluster: representatives of each cluster per selection. samples_per_cluster / cluster_size is the cost
            relative to LESS.
        clustering_method: "kmeans", "spherical_kmeans" (by angle), or "random": equal clusters without regard to content.
        clustering_max_iter: rounds of k-means, at most.
        representative_strategy: "random" anew at every selection; "nearest" to the centre or "farthest" from it; "mixed":
            one half the nearest, the rest random.
        embedding_layer: whose hidden states are clustered, as transformers counts them; -1: those of the output layer.
        combine: "mean", exact; "direction", as DataFlex: the sum of the representatives' projected gradients.
        side: of that projection: a layer's gradient becomes side x side numbers.
        seed: of clusters and representatives.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    cluster_size: Annotated[int, Range(ge=1)] = 64
    num_clusters: Annotated[int | None, Range(ge=1)] = None
    samples_per_cluster: Annotated[int, Range(ge=1)] = 4
    clustering_method: Literal["kmeans", "spherical_kmeans", "random"] = "kmeans"
    clustering_max_iter: Annotated[int, Range(ge=1)] = 10
    representative_strategy: Literal["random", "nearest", "farthest", "mixed"] = "random"
    embedding_layer: int = -1
    combine: Literal["mean", "direction"] = "mean"
    side: Annotated[int, Range(ge=1)] = 16
    seed: Annotated[int, Range(ge=0)] = 42
    _clusters: Clusters | None = field(default=None, init=False, repr=False, compare=False)
    _num_samples: int = field(default=0, init=False, repr=False, compare=False)

    def setup(self, domains: DomainInfo) -> None:
        """Raises ConfigError for more clusters than samples."""
        self._num_samples = sum(domains.num_samples)
        if (self.num_clusters or 1) > self._num_samples:
            found = f"{self._num_samples}, found {self.num_clusters}"
            raise ConfigError(f"selector.cluster_less.num_clusters: at most one per sample, {found}")

    @property
    def cluster_count(self) -> int:
        """The number of clusters, given or derived from the size of the pool."""
        return self.num_clusters or -(-self._num_samples // self.cluster_size)

    def requests(self) -> tuple[Request, ...]:
        clusters = PoolClusterRequest(
            self.cluster_count, self.clustering_method, self.clustering_max_iter, self.embedding_layer, self.seed
        )
        scores = ClusterGradientSignal(
            adam=self.gradient_type == "adam",
            num_clusters=self.cluster_count,
            samples_per_cluster=self.samples_per_cluster,
            strategy=self.representative_strategy,
            combine=self.combine,
            projection=ProjectionSpec("two_sided", self.side, self.seed),
            seed=self.seed,
            clusters=lambda: self._clusters,
        )
        return (clusters, scores)

    def is_due(self, request: Request, step: int) -> bool:
        """The pool is clustered once, before the first selection."""
        return self._clusters is None

    def receive(self, request: Request, value: Clusters, step: int) -> None:
        """Take the clusters of the pool; they are part of the state from then on."""
        self._clusters = value

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1, equal for all members of a cluster; 0 where no representative has a gradient."""
        return max_cosines(table)

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        return select_highest(scores, count, "selector.cluster_less")

    def state_dict(self) -> dict[str, Any]:
        """The clusters, so that a resumed run continues with them."""
        if self._clusters is None:
            return {}
        return {
            "cluster_ids": self._clusters.cluster_ids,
            "squared_distances": self._clusters.squared_distances,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clusters = Clusters(state["cluster_ids"], state["squared_distances"]) if state else None
