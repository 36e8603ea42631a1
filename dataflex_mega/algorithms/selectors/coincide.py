"""COINCIDE: more from clusters that others are like and that are spread out, and a representative part of each.

Lee et al. 2024, "Concept-skill Transferability-based Data Selection for Large Vision-Language Models" (arXiv 2406.10995).
Samples are clustered by hidden states of several layers. With S the mean cosine of a cluster's centre with the other
centres and D the mean of exp(-|u - v|^2) over pairs of its members, its share of the choice is

    P proportional to exp(S / (temperature D))

and inside a cluster the members are taken greedily so that their kernel mean stays nearest to the cluster's. The paper's
features are of image and text tokens; here a sample's features are of all its tokens, the text-only form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.types import Clock, ClusterSpec, NeedsClusters, SignalTable

CLUSTER, TURN, DENSITY, TRANSFER = range(4)  # columns of the scores


def budgets(shares: Tensor, sizes: Tensor, count: int) -> Tensor:
    """[K] shares that sum to 1, [K] sizes -> [K] int64 that sum to `count`, none above its size.

    Largest remainders; what a full cluster cannot take goes to the others by their shares. `count` <= sum of sizes.
    """
    given = torch.zeros_like(sizes)
    while (left := count - int(given.sum())) > 0:
        open_ = given < sizes
        total = shares[open_].sum()
        weights = torch.where(open_, shares / total if float(total) > 0 else 1 / open_.sum(), 0.0)
        exact = weights * left
        whole = exact.floor().long()
        rest = (exact - whole).masked_fill(~open_, -1.0).sort(descending=True, stable=True).indices
        whole[rest[: left - int(whole.sum())]] += 1
        given = torch.minimum(given + whole, sizes)
    return given


@dataclass
class Coincide(Selector, NeedsClusters):
    """Clusters by transferability and density, members by their kernel mean.

    Args:
        mode: "text": features of all tokens. Images are not trained on by dynamic runs, so there is no other yet.
        embedding_layers: hidden states as transformers counts them; None: five, evenly spaced from the first layer to the
            last. With `engine: megatron` only [-1] is there.
        embedding_model_name_or_path: None, as in DataFlex's file: the features are those of the model that trains.
        num_clusters: None: one for every 20 candidates, at most 10000.
        clustering_max_iter: iterations of k-means, which ends before when no sample moves. >= 1.
        temperature: > 0; large gives the clusters equal shares.
        single_member_density: D of a cluster with one member, > 0.
        seed: of the first centres.
        cache_dir: where step_N.json goes; None: output_dir/selections.
    """

    mode: Literal["text"] = "text"
    embedding_layers: list[int] | None = None
    embedding_model_name_or_path: str | None = None
    num_clusters: int | None = None
    clustering_max_iter: int = 10
    temperature: float = 1.0
    single_member_density: float = 1.0
    seed: int = 42
    cache_dir: str | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"clusters"})

    def __post_init__(self) -> None:
        for key in ("temperature", "single_member_density"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"selector.coincide.{key}: must be finite and > 0, found {value}")
        for key in ("num_clusters", "clustering_max_iter"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"selector.coincide.{key}: must be >= 1, found {value}")
        if self.embedding_model_name_or_path is not None:
            found = f"found {self.embedding_model_name_or_path!r}"
            raise ConfigError(
                f"selector.coincide.embedding_model_name_or_path: only the model that trains is read; {found}"
            )
        if self.embedding_layers is not None and len(set(self.embedding_layers)) != max(1, len(self.embedding_layers)):
            raise ConfigError(f"selector.coincide.embedding_layers: must differ, found {self.embedding_layers}")

    def cluster_spec(self) -> ClusterSpec:
        """As the parameters say."""
        layers = None if self.embedding_layers is None else tuple(self.embedding_layers)
        return ClusterSpec(layers, self.num_clusters, self.seed, self.clustering_max_iter, self.single_member_density)

    def score(self, table: SignalTable) -> Tensor:
        """[n, 4] float32: cluster, turn in it, its density, its transferability. Whole numbers are exact below 2**24."""
        return torch.stack([table[name].float() for name in ("cluster", "turn", "density", "transfer")], dim=1)

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] int64 positions in ascending order. Raises DataError when there are fewer candidates."""
        if count > len(scores):
            raise DataError(f"selector.coincide: {count} samples wanted, {len(scores)} candidates are there")
        clusters, member, sizes = scores[:, CLUSTER].long().unique(return_inverse=True, return_counts=True)
        of_cluster = torch.zeros(len(clusters), 2, dtype=torch.float64)
        of_cluster[member] = scores[:, DENSITY:].double()  # equal for all members
        shares = torch.softmax(of_cluster[:, 1] / (self.temperature * of_cluster[:, 0]), dim=0)
        budget = budgets(shares, sizes, count)
        # The candidates' places by turn within their clusters; with a mixer a cluster may lack members of other domains.
        ordered = scores[:, TURN].sort(stable=True).indices
        ordered = ordered[member[ordered].sort(stable=True).indices]
        starts = sizes.cumsum(0) - sizes
        place = torch.arange(len(scores)) - starts[member[ordered]]
        return ordered[place < budget[member[ordered]]].sort().values
