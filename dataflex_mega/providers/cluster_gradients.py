"""Clusters of a run's pool and scores of them by a few of their members, the work divided over ranks by clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import ClusterGradientSignal, PoolClusterRequest
from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.providers.context import CandidateScope, PlanScope, SignalContext
from dataflex_mega.providers.gradient_features import GradientFeatures
from dataflex_mega.providers.gradients import gradient_scorer
from dataflex_mega.providers.registry import Provider, provides
from dataflex_mega.signals.kmeans import ShardedRows, choose_representatives, fit_kmeans
from dataflex_mega.signals.pool_share import rank_counts
from dataflex_mega.types import Clusters, EmbeddingSpec


@provides(PoolClusterRequest, scope="plan", requires={Capability.LAST_HIDDEN_STATE})
class PoolClusterProvider(Provider):
    """Mean hidden states of length 1, clustered over all ranks."""

    def compute(self, request: PoolClusterRequest, scope: PlanScope) -> Clusters:
        c = self.context
        counts = rank_counts(len(c.pool), c.batch_size, c.parallel_info.dp_size)
        first = sum(counts[: c.parallel_info.dp_rank])
        ids = np.arange(first, first + counts[c.parallel_info.dp_rank], dtype=np.int64)
        spec, rows = EmbeddingSpec(layer=request.embedding_layer), []
        for batch_ids, _ in lockstep_batches(ids, c.batch_size, -(-max(counts) // c.batch_size)):
            rows.append(c.engine.embed(c.collate(c.pool.fetch(batch_ids)), spec).float().cpu())
        data = ShardedRows(torch.cat(rows)[: len(ids)], counts, c.parallel_info.dp_rank)
        k = request.num_clusters
        c.report(f"cluster_less: {len(c.pool)} samples into {k} clusters by {request.method}")
        labels, distances = fit_kmeans(data, k, request.max_iterations, request.seed, request.method, c.collectives)
        gather = partial(c.collectives.all_gather_uneven, counts=counts)
        return Clusters(gather(labels), gather(distances))


@dataclass(frozen=True)
class ClusterScore:
    """What is added up over the representatives of a cluster, and what comes of the mean."""

    rows: Callable[[np.ndarray, int], Tensor]  # ([n] ids, number of batches) -> [n, m]; zeros without a gradient
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]  # [c, m] means -> [c, S] dot, [c] norm2


@provides(
    ClusterGradientSignal,
    scope="candidates",
    requires={Capability.GRADIENT_SCORES, Capability.GRADIENT_FEATURES, Capability.LAST_HIDDEN_STATE},
    needs_targets=True,
    whole_pool=False,
)
class ClusterGradientProvider(Provider):
    """`dot` and `norm2` of each candidate's cluster; only representatives see a backward pass."""

    def __init__(self, context: SignalContext) -> None:
        super().__init__(context)
        self.reported: set[str] = set()

    def compute(self, request: ClusterGradientSignal, scope: CandidateScope) -> dict[str, Tensor]:
        clusters = request.clusters()
        assert clusters is not None, "PoolClusterRequest is served before"
        words = np.random.SeedSequence([request.seed, scope.step]).generate_state(1, np.uint64)
        rng = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        representatives = choose_representatives(
            clusters.cluster_ids, clusters.squared_distances, request.samples_per_cluster, request.strategy, rng
        )
        by = self._directions if request.combine == "direction" else self._cosines
        dot, norm2 = self._score_clusters(request, clusters, representatives, by(request))
        of_candidate = clusters.cluster_ids[torch.from_numpy(scope.ids)]
        return {"dot": dot[of_candidate], "norm2": norm2[of_candidate]}

    def _score_clusters(
        self, request: ClusterGradientSignal, clusters: Clusters, representatives: Tensor, by: ClusterScore
    ) -> tuple[Tensor, Tensor]:
        """[m] representatives -> ([k, S], [k]) of all clusters, on every rank. A rank scores a contiguous range of the
        clusters, a few at a time."""
        parallel, k, size = self.context.parallel_info, request.num_clusters, self.context.batch_size
        cluster_of = clusters.cluster_ids[representatives]
        ends = [k * (rank + 1) // parallel.dp_size for rank in range(parallel.dp_size)]
        counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        begin, end = ends[parallel.dp_rank] - counts[parallel.dp_rank], ends[parallel.dp_rank]
        per_turn = max(1, size // request.samples_per_cluster)
        num_batches = -(-per_turn * request.samples_per_cluster // size)
        num_turns = -(-max(counts) // per_turn)
        progress = ProgressCounter("cluster_less: clusters", k) if parallel.is_main else None
        scored: list[tuple[Tensor, Tensor]] = []
        for turn in range(num_turns):
            low = min(begin + turn * per_turn, end)
            high = min(low + per_turn, end)
            inside = (cluster_of >= low) & (cluster_of < high)
            rows = by.rows(representatives[inside].numpy(), num_batches).float()
            sums = torch.zeros(high - low, rows.shape[1]).index_add_(0, cluster_of[inside] - low, rows)
            members = torch.bincount(cluster_of[inside] - low, minlength=high - low).clamp(min=1)
            scored.append(by.finish(sums / members.unsqueeze(1)))
            if progress is not None:
                progress(min(k, (turn + 1) * per_turn * parallel.dp_size))
        dot, norm2 = (torch.cat(parts) for parts in zip(*scored, strict=True))
        gather = partial(self.context.collectives.all_gather_uneven, counts=counts)
        return gather(dot), gather(norm2)

    def _target_batches(self) -> Any:
        return self.context.target_batches(self.context.target_groups())

    def _cosines(self, request: ClusterGradientSignal) -> ClusterScore:
        """Exact: the cosines of each representative with the directions."""
        c = self.context
        scorer = gradient_scorer(c, request.adam, self.reported)
        directions = scorer.directions(self._target_batches())

        def rows(ids: np.ndarray, num_batches: int) -> Tensor:
            cosines = []
            for batch_ids, count in lockstep_batches(ids, c.batch_size, num_batches):
                dot, norm2 = scorer.score(c.collate_unpacked(c.pool.fetch(batch_ids)), directions)
                norm = norm2.cpu().sqrt().unsqueeze(1)
                cosines.append(torch.where(norm > 0, dot.cpu() / norm, 0.0)[:count])
            return torch.cat(cosines)

        return ClusterScore(rows, lambda means: (means, torch.ones(len(means))))

    def _directions(self, request: ClusterGradientSignal) -> ClusterScore:
        """As DataFlex: the sum of the representatives' normalised gradients, projected, is compared with the directions."""
        features = GradientFeatures(self.context, request.projection, request.adam)
        targets = features.directions(self._target_batches())

        def rows(ids: np.ndarray, num_batches: int) -> Tensor:
            values = features.rows(ids, num_batches)
            length = values.norm(dim=1, keepdim=True)
            return torch.where(length > 0, values / length, 0.0)

        return ClusterScore(rows, lambda means: (means @ targets.t(), means.square().sum(1)))
