"""What the controller needs of the object that computes signals. Tests fake it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from dataflex_mega.algorithms.base import Algorithm, Selector
from dataflex_mega.types import SignalTable


class SignalSource(Protocol):
    """See providers.server.SignalServer. Every rank calls each method at the same time."""

    def signal_names(self, selector: Selector) -> list[str]:
        """The names of the signals that a selector scores by, sorted."""
        ...

    def table(self, selector: Selector, ids: np.ndarray | None, step: int) -> tuple[SignalTable, list[int]]:
        """[N] ascending ids, or None for the whole pool -> (this rank's rows, how many rows each rank has)."""
        ...

    def domain_ids(self, ids: Tensor) -> Tensor:
        """[n] global ids -> [n] int64 domains."""
        ...

    def before_update(self, algorithm: Algorithm, step: int) -> None:
        """Hand an algorithm the values it requested for its update after `step` steps."""
        ...

    def before_step(self, algorithm: Algorithm, step: int, ids: Callable[[], np.ndarray]) -> None:
        """Hand an algorithm the values it requested for the next step, which trains the samples `ids()` [G]."""
        ...
