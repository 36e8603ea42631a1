"""Vectors of samples from hidden states: of training samples in the forward pass, of target samples before a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dataflex_mega.algorithms.requests import EmbeddingSignal, TargetEmbeddingSignal
from dataflex_mega.engines.capabilities import Capability
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers.context import BatchScope
from dataflex_mega.providers.registry import EngineInfo, Provider, provides
from dataflex_mega.signals.sample_embeddings import MeanTargetEmbedding


@provides(EmbeddingSignal, scope="forward", requires={Capability.LAST_HIDDEN_STATE})
class EmbeddingProvider(Provider):
    """The engine captures the hidden states while it trains."""

    @classmethod
    def step_options(cls, request: EmbeddingSignal) -> dict[str, Any]:
        return {"embedding_spec": request.spec}

    @classmethod
    def check(cls, request: EmbeddingSignal, engine: EngineInfo, who: str) -> None:
        check_layers((request.spec.layer,), engine, who, request.layer_parameter)


@provides(TargetEmbeddingSignal, scope="batch", requires={Capability.LAST_HIDDEN_STATE}, needs_targets=True)
class TargetEmbeddingProvider(Provider):
    """A forward pass over the target samples."""

    def compute(self, request: TargetEmbeddingSignal, scope: BatchScope) -> Tensor:
        c = self.context
        mean = MeanTargetEmbedding(
            list(c.evaluation.values()),
            c.collate,
            c.engine.embed,
            c.batch_size,
            c.parallel_info.dp_rank,
            c.parallel_info.dp_size,
            c.collectives.all_reduce_sum,
        )
        return mean(request.spec, request.num_targets)


def check_layers(layers: tuple[int, ...] | None, engine: EngineInfo, who: str, parameter: str) -> None:
    """Refuse hidden states that an engine cannot capture. `layers`: None for evenly spaced ones.

    Raises ConfigError naming the algorithm's parameter.
    """
    if Capability.ALL_HIDDEN_STATES in engine.capabilities or layers == (-1,):
        return
    role, _, name = who.partition(" ")
    only = "-1" if parameter == "embed_layer" else "[-1]"
    found = "null" if layers is None else list(layers)
    raise ConfigError(
        f"{role}.{name}.{parameter}: engine: {engine.name} has the last layer only; set {only}, found {found}"
    )
