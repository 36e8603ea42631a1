"""What the controller needs of the object that computes signals. Tests fake it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from dataflex_mega.types import SignalTable


class SignalSource(Protocol):
    """See signals.computer.SignalComputer."""

    step: int  # optimizer steps done when signals are computed

    def restrict_to(self, ids: np.ndarray) -> None: ...
    def subset(self, ids: Tensor) -> SignalSource: ...
    def rank_counts(self) -> list[int]: ...
    def domain_ids(self, ids: Tensor) -> Tensor: ...
    def table(self, signals: frozenset[str]) -> SignalTable: ...
