"""Clusters of the candidates and how they lie to one another; see signals.clusters."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.requests import ClusterSignal
from dataflex_mega.data.media import media_kinds
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.providers.context import CandidateScope
from dataflex_mega.providers.embeddings import check_layers
from dataflex_mega.providers.registry import EngineInfo, Provider, provides
from dataflex_mega.signals.clusters import cluster_signals
from dataflex_mega.signals.sample_embeddings import l2_normalize
from dataflex_mega.types import EmbeddingSpec


@provides(ClusterSignal, scope="candidates", requires={Capability.LAST_HIDDEN_STATE}, whole_pool=True)
class ClusterProvider(Provider):
    """Features from the hidden states of the current model, k-means over all ranks."""

    def compute(self, request: ClusterSignal, scope: CandidateScope) -> dict[str, Tensor]:
        c, spec = self.context, request.spec
        layers = spec.layers if spec.layers is not None else evenly_spaced_layers(c.engine.num_layers)
        has_media = any(media_kinds(domain.rows) for domain in c.pool.domains)
        apart = spec.mode == "image_text" or (spec.mode == "auto" and has_media)
        kinds: tuple[Literal["all", "media", "text"], ...] = ("media", "text") if apart else ("all",)
        specs = [EmbeddingSpec("mean", layer, tanh=True, tokens=kind) for layer in layers for kind in kinds]
        rows = [c.engine.embed(c.collate(samples), *specs).cpu() for samples, _ in scope.batches()]
        features = l2_normalize(torch.cat(rows)[: len(scope.ids)])
        pool_share = scope.pool_share
        return cluster_signals(
            features, pool_share.first_position(), sum(pool_share.rank_counts()), spec, c.collectives
        )

    @classmethod
    def check(cls, request: ClusterSignal, engine: EngineInfo, who: str) -> None:
        check_layers(request.spec.layers, engine, who, request.layer_parameter)


def evenly_spaced_layers(depth: int, count: int = 5) -> tuple[int, ...]:
    """Hidden states 1 .. depth, `count` of them evenly spaced, or all where there are fewer."""
    return tuple(sorted({round(1 + (depth - 1) * i / (count - 1)) for i in range(count)}))
