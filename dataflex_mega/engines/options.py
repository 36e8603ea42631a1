"""What a training step does besides forward and backward; the same keys for both engines."""

from __future__ import annotations

from dataclasses import dataclass

from dataflex_mega.objective import Normalization
from dataflex_mega.types import HiddenSpec


@dataclass(frozen=True)
class Options:
    """Keys of the YAML that a step acts on."""

    domains: int
    max_grad_norm: float = 1.0  # 0 turns clipping off
    lookahead: str = "micro"  # whose losses a weighter compares: of a micro-batch, or "exact" of the whole step
    normalization: Normalization = "token"
    on_nan: str = "stop"  # or "continue": skip the step
    loads: bool = False  # whether a mixer wants to know where routers send tokens
    hidden: HiddenSpec | None = None  # what a weighter wants of the training forward, besides losses
