"""Losses of the pool that several roles share: measured once, used by all until they are too old.

Selecting by loss and ordering by loss at one step cost one forward pass over the pool and not two. Where a role may use
losses of some steps ago, it pays for the samples whose loss is older than that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.types import SignalTable

LOSS = frozenset({"loss"})


class Scores(Protocol):
    """What is needed of signals.Scorer."""

    def shares(self) -> list[int]: ...
    def table(self, needs: frozenset[str]) -> SignalTable: ...
    def only(self, ids: Tensor) -> Scores: ...
    def domains(self, ids: Tensor) -> Tensor: ...


class Ranks(Protocol):
    """What is needed of distributed.Collectives."""

    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor: ...


@dataclass
class Board:
    """One for a run, the same on every rank. `size`: N."""

    scores: Scores
    ranks: Ranks
    size: int
    losses: Tensor = field(init=False)  # [N] float32
    measured: Tensor = field(init=False)  # [N] int32, the step at which each was measured; -1: never

    def __post_init__(self) -> None:
        self.losses = torch.full((self.size,), torch.nan)
        self.measured = torch.full((self.size,), -1, dtype=torch.int32)

    def score(self, selector: Selector, ids: Tensor, step: int, max_age: int = 0) -> Tensor:
        """[n] ids, ascending -> [n] float32, what the selector scores them. Every rank must call it.

        `max_age`: how many steps old a loss may be. Other signals are always measured.
        """
        if selector.needs == LOSS:
            self._refresh(ids, step, max_age)
            return self._from_losses(selector, ids)
        return self._measured(selector, ids)

    def fresh(self, ids: Tensor, step: int, max_age: int = 0) -> Tensor:
        """[n] bool: whether the loss of each is there and young enough."""
        age = step - self.measured[ids]
        return (self.measured[ids] >= 0) & (age >= 0) & (age <= max_age)

    def _refresh(self, ids: Tensor, step: int, max_age: int) -> None:
        stale = ids[~self.fresh(ids, step, max_age)]
        if len(stale) == 0:
            return
        part = self.scores.only(stale)
        self.losses[stale] = self.ranks.gather_uneven(part.table(LOSS)["loss"].float(), part.shares())
        self.measured[stale] = step

    def _from_losses(self, selector: Selector, ids: Tensor) -> Tensor:
        """Every rank scores all of them: that is arithmetic on numbers all ranks have."""
        return selector.score(SignalTable(ids, self.scores.domains(ids), {"loss": self.losses[ids]})).float()

    def _measured(self, selector: Selector, ids: Tensor) -> Tensor:
        part = self.scores.only(ids)
        return self.ranks.gather_uneven(selector.score(part.table(selector.needs)).float(), part.shares())

    def state(self) -> dict[str, Any]:
        """Both tensors."""
        return {"losses": self.losses, "measured": self.measured}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.losses, self.measured = state["losses"].clone(), state["measured"].clone()
