"""LESS for pools that are too large to score whole: a few representatives of each cluster answer for all its members.

DataFlex's (arXiv 2603.26164); there is no other paper. Samples are clustered once, by their mean hidden states. At every
selection some samples of each cluster are drawn, their gradients are compared with those of the targets as LESS does
(arXiv 2402.04333), and the cluster's score is that of all its members:

    direction   max over sub-tasks s of  cos(sum over representatives r of G_r / |G_r|,  U_s)
    mean        max over sub-tasks s of  mean over representatives r of  <G_r, U_s> / |G_r|

with U_s the mean of the normalised target gradients. With every sample a cluster of its own both are LESS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, Clusters, FeatureSpec, SignalTable, UsesClusters


@dataclass
class ClusterLess(Selector, UsesClusters):
    """The members of the clusters with the highest scores.

    Args:
        gradient_type: "adam" preconditions the representatives' gradients, "sgd" does not.
        cluster_size: members that a cluster has on average, unless num_clusters is given.
        num_clusters: how many clusters; None: the size of the pool / cluster_size, rounded up.
        samples_per_cluster: representatives of each cluster at a selection. samples_per_cluster / cluster_size is the cost
            relative to LESS.
        clustering_method: "kmeans", "spherical_kmeans" (by angle), or "random": equal clusters without regard to content.
        clustering_max_iter: rounds of k-means, at most.
        representative_strategy: "random" anew at every selection; "nearest" to the centre or "farthest" from it; "mixed":
            one half the nearest, the rest random.
        embedding_layer: whose hidden states are clustered, as transformers counts them; -1: those of the output layer.
        combine: "mean", exact; "direction", as DataFlex: the representatives' gradients are added, for which they are
            projected.
        side: of that projection: a layer's gradient becomes side x side numbers.
        seed: of clusters and representatives.
        cache_dir: where step_N.json goes; None: output_dir/selections.
        proj_dim: stands in DataFlex's files; it changes nothing.
        save_interval: the same.
        clustering_batch_size: the same.
        embedding_model_dtype: the same.
        embedding_model_name_or_path: the same; only null, since the model that trains embeds the samples.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    cluster_size: int = 64
    num_clusters: int | None = None
    samples_per_cluster: int = 4
    clustering_method: Literal["kmeans", "spherical_kmeans", "random"] = "kmeans"
    clustering_max_iter: int = 10
    representative_strategy: Literal["random", "nearest", "farthest", "mixed"] = "random"
    embedding_layer: int = -1
    combine: Literal["mean", "direction"] = "mean"
    side: int = 16
    seed: int = 42
    cache_dir: str | None = None
    proj_dim: int | None = None
    save_interval: int | None = None
    clustering_batch_size: int | None = None
    embedding_model_dtype: str | None = None
    embedding_model_name_or_path: str | None = None
    _clusters: Clusters | None = field(default=None, init=False, repr=False, compare=False)
    _samples: int = field(default=0, init=False, repr=False, compare=False)

    needs: ClassVar[frozenset[str]] = frozenset({"cluster_adam"})

    def __post_init__(self) -> None:
        for name in ("cluster_size", "num_clusters", "samples_per_cluster", "clustering_max_iter", "side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"selector.cluster_less.{name}: must be at least 1, found {value}")
        if self.embedding_model_name_or_path is not None:
            found = (
                f"expected null: the model that trains embeds the samples, found {self.embedding_model_name_or_path}"
            )
            raise ConfigError(f"selector.cluster_less.embedding_model_name_or_path: {found}")
        self.needs = frozenset({f"cluster_{self.gradient_type}"})  # type: ignore[misc]  # of this instance

    def setup(self, domains: Domains) -> None:
        """Raises ConfigError for more clusters than samples."""
        self._samples = sum(domains.sizes)
        if (self.num_clusters or 1) > self._samples:
            raise ConfigError(
                f"selector.cluster_less.num_clusters: at most one a sample, {self._samples}, found {self.num_clusters}"
            )

    @property
    def cluster_count(self) -> int:
        """k."""
        return self.num_clusters or -(-self._samples // self.cluster_size)

    def feature_spec(self) -> FeatureSpec:
        """For combine: direction."""
        return FeatureSpec("two_sided", self.side, self.seed)

    @property
    def clusters(self) -> Clusters | None:
        """Those of the run, once they are found."""
        return self._clusters

    def keep(self, clusters: Clusters) -> None:
        """Use these from now on."""
        self._clusters = clusters

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 in -1..1, equal for all members of a cluster; 0 where no representative has a gradient."""
        norm = table["norm2"].sqrt().unsqueeze(1)
        return torch.where(norm > 0, table["dot"] / norm, torch.zeros_like(table["dot"])).max(dim=1).values

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] positions, highest score first, the lower position where scores are equal."""
        if count > len(scores):
            raise DataError(f"selector.cluster_less: {count} samples wanted, {len(scores)} candidates are there")
        ranked = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -torch.inf))
        return torch.sort(ranked, descending=True, stable=True).indices[:count]

    def state(self) -> dict[str, Any]:
        """The clusters, so that a resumed run goes on with them."""
        if self._clusters is None:
            return {}
        return {"own": self._clusters.own, "distance": self._clusters.distance}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._clusters = Clusters(state["own"], state["distance"]) if state else None
