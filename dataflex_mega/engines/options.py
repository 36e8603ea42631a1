"""What a training step does besides forward and backward; the same keys for both engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dataflex_mega.losses.base import LossForm
from dataflex_mega.objective import TOKEN_SUM, Normalization, SampleLoss
from dataflex_mega.types import EmbeddingSpec


@dataclass(frozen=True)
class StepOptions:
    """Keys of the YAML that a step acts on."""

    num_domains: int
    max_grad_norm: float = 1.0  # 0 turns clipping off
    weight_scope: str = "micro_batch"  # whose losses a weighter compares: those of a micro-batch or of the "step"
    normalization: Normalization = "token"
    sample_loss: SampleLoss = TOKEN_SUM  # what the loss of a sample is
    on_non_finite: str = "stop"  # or "continue": skip the step
    count_router_loads: bool = False  # whether a mixer wants to know where routers send tokens
    embedding_spec: EmbeddingSpec | None = None  # what a weighter wants of the training forward, besides losses
    loss_form: LossForm | None = None  # what is differentiated of a token; None: its cross-entropy
    moe_aux_loss_coef: float = 0.0  # weight of the routers' load-balancing loss; 0: none
    stop_requested: Callable[[], bool] | None = None  # whether this process was asked to leave after the step
