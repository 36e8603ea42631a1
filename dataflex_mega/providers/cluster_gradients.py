"""Clusters of a run's pool and scores of them by a few of their members, the work divided over ranks by clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.progress import Count
from dataflex_mega.providers.stored_gradients import Features
from dataflex_mega.signals.kmeans import Divided, cluster, representatives
from dataflex_mega.types import Clusters, HiddenSpec, UsesClusters

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build
    from dataflex_mega.signals.scorer import Provider, Scorer


def provider(adam: bool) -> Callable[[Build, Any, Any], Provider]:
    """For providers.registry: `dot` and `norm2` of each candidate's cluster; only representatives see a backward pass."""

    def make(run: Build, engine: Any, selector: Any) -> Provider:
        def signals(scorer: Scorer, ids: np.ndarray) -> dict[str, Tensor]:
            clusters: Clusters = selector.clusters or find(run, engine, selector, scorer)
            selector.keep(clusters)
            words = np.random.SeedSequence([selector.seed, scorer.step]).generate_state(1, np.uint64)
            rng = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            count, strategy = selector.samples_per_cluster, selector.representative_strategy
            chosen = representatives(clusters.own, clusters.distance, count, strategy, rng)
            measure = _directions if selector.combine == "direction" else _cosines
            dot, norm2 = measured(run, selector, scorer, chosen, measure(run, engine, selector, scorer, adam))
            mine = clusters.own[torch.from_numpy(ids)]
            return {"dot": dot[mine], "norm2": norm2[mine]}

        return signals

    return make


def find(run: Build, engine: Any, selector: UsesClusters, scorer: Scorer) -> Clusters:
    """Cluster the whole pool by mean hidden states of length 1, with the model of now."""
    scorer = replace(scorer)  # of the whole pool, whatever part of it a selection considers
    shares = scorer.shares()
    first = sum(shares[: scorer.rank])
    ids = np.arange(first, first + shares[scorer.rank], dtype=np.int64)
    spec = HiddenSpec(layer=selector.embedding_layer)
    rows = [engine.embed(scorer.collate(samples), spec).float().cpu() for samples, _ in scorer.batches(ids)]
    data = Divided(torch.cat(rows)[: len(ids)], shares, scorer.rank)
    k, rounds = selector.cluster_count, selector.clustering_max_iter
    run.say(f"cluster_less: {len(run.pool)} samples into {k} clusters by {selector.clustering_method}")
    own, distance = cluster(data, k, rounds, selector.seed, selector.clustering_method, run.ranks)
    return Clusters(run.ranks.gather_uneven(own, shares), run.ranks.gather_uneven(distance, shares))


@dataclass(frozen=True)
class Measure:
    """What is added up over the representatives of a cluster, and what comes of the sum."""

    rows: Callable[[np.ndarray, int], Tensor]  # ([n] ids, batches to call) -> [n, m], a row of zeros without a gradient
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]  # [c, m] means -> [c, S] dot, [c] norm2


def measured(
    run: Build, selector: UsesClusters, scorer: Scorer, chosen: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    """[m] representatives -> ([k, S], [k]) of all clusters, on every rank. A rank measures a contiguous part of the
    clusters, a few at a time."""
    assert selector.clusters is not None
    k, size = selector.cluster_count, scorer.batch_size
    of = selector.clusters.own[chosen]
    ends = [k * (rank + 1) // scorer.ranks for rank in range(scorer.ranks)]
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    begin, end = ends[scorer.rank] - counts[scorer.rank], ends[scorer.rank]
    together = max(1, size // selector.samples_per_cluster)
    calls = -(-together * selector.samples_per_cluster // size)
    turns = -(-max(counts) // together)
    count = Count("cluster_less: clusters", k) if run.mesh.is_main else None
    found: list[tuple[Tensor, Tensor]] = []
    for turn in range(turns):
        low = min(begin + turn * together, end)
        high = min(low + together, end)
        here = (of >= low) & (of < high)
        rows = measure.rows(chosen[here].numpy(), calls).float()
        sums = torch.zeros(high - low, rows.shape[1]).index_add_(0, of[here] - low, rows)
        members = torch.bincount(of[here] - low, minlength=high - low).clamp(min=1)
        found.append(measure.finish(sums / members.unsqueeze(1)))
        if count is not None:
            count(min(k, (turn + 1) * together * scorer.ranks))
    dot, norm2 = (torch.cat(parts) for parts in zip(*found, strict=True))
    return run.ranks.gather_uneven(dot, counts), run.ranks.gather_uneven(norm2, counts)


def _padded(ids: np.ndarray) -> np.ndarray:
    """A rank without representatives computes sample 0 and drops it: sharded layers are called together."""
    return ids if len(ids) else np.zeros(1, dtype=np.int64)


def _cosines(run: Build, engine: Any, selector: UsesClusters, scorer: Scorer, adam: bool) -> Measure:
    """Exact: the cosines of each representative with the directions."""
    assert scorer.targets is not None, "checked when the run was built"
    gradients, collate = scorer.targets.scorer(adam), scorer.targets.collate
    directions = gradients.directions(scorer.target_batches())

    def rows(ids: np.ndarray, calls: int) -> Tensor:
        found = []
        for call in range(calls):
            here = ids[call * scorer.batch_size : (call + 1) * scorer.batch_size]
            dot, norm2 = gradients.score(collate(run.pool.fetch(_padded(here))), directions)
            norm = norm2.cpu().sqrt().unsqueeze(1)
            found.append(torch.where(norm > 0, dot.cpu() / norm, 0.0)[: len(here)])
        return torch.cat(found)

    return Measure(rows, lambda means: (means, torch.ones(len(means))))


def _directions(run: Build, engine: Any, selector: UsesClusters, scorer: Scorer, adam: bool) -> Measure:
    """As DataFlex: the sum of the representatives' normalised gradients, projected, is compared with the directions."""
    features = Features.of(run, engine, selector.feature_spec(), adam)
    targets = features.directions(scorer.target_batches())

    def rows(ids: np.ndarray, calls: int) -> Tensor:
        values = features.rows(_padded(ids), calls)[: len(ids)]
        length = values.norm(dim=1, keepdim=True)
        return torch.where(length > 0, values / length, 0.0)

    return Measure(rows, partial(_compare, targets))


def _compare(targets: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    return means @ targets.t(), means.square().sum(1)
