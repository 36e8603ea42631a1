"""Clusters of a run's pool and scores of them by a few of their members, the work divided over ranks by clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.providers.stored_gradients import Features
from dataflex_mega.signals.kmeans import ShardedRows, choose_representatives, fit_kmeans
from dataflex_mega.types import Clusters, EmbeddingSpec, UsesClusters

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build
    from dataflex_mega.signals.computer import Provider, SignalComputer


def provider(adam: bool) -> Callable[[Build, Any, Any], Provider]:
    """For providers.registry: `dot` and `norm2` of each candidate's cluster; only representatives see a backward pass."""

    def make(run: Build, engine: Any, selector: Any) -> Provider:
        def signals(computer: SignalComputer, ids: np.ndarray) -> dict[str, Tensor]:
            clusters: Clusters = selector.clusters or find(run, engine, selector, computer)
            selector.set_clusters(clusters)
            words = np.random.SeedSequence([selector.seed, computer.step]).generate_state(1, np.uint64)
            rng = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
            count, strategy = selector.samples_per_cluster, selector.representative_strategy
            chosen = choose_representatives(clusters.cluster_ids, clusters.squared_distances, count, strategy, rng)
            measure = _directions if selector.combine == "direction" else _cosines
            dot, norm2 = measured(run, selector, computer, chosen, measure(run, engine, selector, computer, adam))
            mine = clusters.cluster_ids[torch.from_numpy(ids)]
            return {"dot": dot[mine], "norm2": norm2[mine]}

        return signals

    return make


def find(run: Build, engine: Any, selector: UsesClusters, computer: SignalComputer) -> Clusters:
    """Cluster the whole pool by mean hidden states of length 1, with the model of now."""
    computer = replace(computer)  # of the whole pool, whatever part of it a selection considers
    shares, ids = computer.rank_counts(), computer.local_ids()
    spec = EmbeddingSpec(layer=selector.embedding_layer)
    rows = [engine.embed(computer.collate(samples), spec).float().cpu() for samples, _ in computer.batches(ids)]
    data = ShardedRows(torch.cat(rows)[: len(ids)], shares, computer.dp_rank)
    k, rounds = selector.cluster_count, selector.clustering_max_iter
    run.say(f"cluster_less: {len(run.pool)} samples into {k} clusters by {selector.clustering_method}")
    own, distance = fit_kmeans(data, k, rounds, selector.seed, selector.clustering_method, run.collectives)
    return Clusters(run.collectives.all_gather_uneven(own, shares), run.collectives.all_gather_uneven(distance, shares))


@dataclass(frozen=True)
class Measure:
    """What is added up over the representatives of a cluster, and what comes of the sum."""

    rows: Callable[[np.ndarray, int], Tensor]  # ([n] ids, batches to call) -> [n, m], a row of zeros without a gradient
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]  # [c, m] means -> [c, S] dot, [c] norm2


def measured(
    run: Build, selector: UsesClusters, computer: SignalComputer, chosen: Tensor, measure: Measure
) -> tuple[Tensor, Tensor]:
    """[m] representatives -> ([k, S], [k]) of all clusters, on every rank. A rank measures a contiguous part of the
    clusters, a few at a time."""
    assert selector.clusters is not None
    k, size = selector.cluster_count, computer.batch_size
    of = selector.clusters.cluster_ids[chosen]
    ends = [k * (rank + 1) // computer.dp_size for rank in range(computer.dp_size)]
    counts = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    begin, end = ends[computer.dp_rank] - counts[computer.dp_rank], ends[computer.dp_rank]
    together = max(1, size // selector.samples_per_cluster)
    calls = -(-together * selector.samples_per_cluster // size)
    turns = -(-max(counts) // together)
    count = ProgressCounter("cluster_less: clusters", k) if run.parallel_info.is_main else None
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
            count(min(k, (turn + 1) * together * computer.dp_size))
    dot, norm2 = (torch.cat(parts) for parts in zip(*found, strict=True))
    return run.collectives.all_gather_uneven(dot, counts), run.collectives.all_gather_uneven(norm2, counts)


def _cosines(run: Build, engine: Any, selector: UsesClusters, computer: SignalComputer, adam: bool) -> Measure:
    """Exact: the cosines of each representative with the directions."""
    assert computer.targets is not None, "checked when the run was built"
    gradients, collate = computer.targets.gradient_scorer(adam), computer.targets.collate
    directions = gradients.directions(computer.target_batches())

    def rows(ids: np.ndarray, calls: int) -> Tensor:
        cosines = []
        for batch_ids, count in lockstep_batches(ids, computer.batch_size, calls, filler=FIRST_ID):
            dot, norm2 = gradients.score(collate(run.pool.fetch(batch_ids)), directions)
            norm = norm2.cpu().sqrt().unsqueeze(1)
            cosines.append(torch.where(norm > 0, dot.cpu() / norm, 0.0)[:count])
        return torch.cat(cosines)

    return Measure(rows, lambda means: (means, torch.ones(len(means))))


def _directions(run: Build, engine: Any, selector: UsesClusters, computer: SignalComputer, adam: bool) -> Measure:
    """As DataFlex: the sum of the representatives' normalised gradients, projected, is compared with the directions."""
    features = Features.of(run, engine, selector.feature_spec(), adam)
    targets = features.directions(computer.target_batches())

    def rows(ids: np.ndarray, calls: int) -> Tensor:
        values = features.rows(ids, calls)
        length = values.norm(dim=1, keepdim=True)
        return torch.where(length > 0, values / length, 0.0)

    return Measure(rows, partial(_compare, targets))


def _compare(targets: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    return means @ targets.t(), means.square().sum(1)
