"""Losses of the pool that several roles share: computed once, used by all until they are too old.

Selecting by loss and ordering by loss at one step cost one forward pass over the pool and not two. Where a role may use
losses of some steps ago, it pays only for the samples whose loss is older than that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.algorithms.requests import LossSignal
from dataflex_mega.control import contracts
from dataflex_mega.control.signal_source import SignalSource
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.types import SignalTable


@dataclass
class LossCache:
    """One instance per run; every rank computes the same.

    Args:
        size: N, samples of the pool.
    """

    signals: SignalSource
    collectives: Collectives
    size: int
    losses: Tensor = field(init=False)  # [N] float32
    measured_at_step: Tensor = field(init=False)  # [N] int32, the step at which each loss was computed; -1: never

    def __post_init__(self) -> None:
        self.losses = torch.full((self.size,), torch.nan)
        self.measured_at_step = torch.full((self.size,), -1, dtype=torch.int32)

    def score(self, selector: Selector, ids: Tensor, step: int, max_age: int = 0) -> Tensor:
        """[n] ids, ascending -> [n] float32, the selector's scores of them. Every rank must call it.

        `max_age`: how many steps old a loss may be. Other signals are computed at every call.
        """
        if selector.requests() == (LossSignal(),):
            self._refresh(selector, ids, step, max_age)
            return self._score_cached(selector, ids)
        return self._score_now(selector, ids, step)

    def is_fresh(self, ids: Tensor, step: int, max_age: int = 0) -> Tensor:
        """[n] bool: whether the loss of each sample is known and at most `max_age` steps old."""
        age = step - self.measured_at_step[ids]
        return (self.measured_at_step[ids] >= 0) & (age >= 0) & (age <= max_age)

    def _refresh(self, selector: Selector, ids: Tensor, step: int, max_age: int) -> None:
        stale_ids = ids[~self.is_fresh(ids, step, max_age)]
        if len(stale_ids) == 0:
            return
        table, counts = self.signals.table(selector, stale_ids.numpy(), step)
        self.losses[stale_ids] = self.collectives.all_gather_uneven(table["loss"].float(), counts)
        self.measured_at_step[stale_ids] = step

    def _score_cached(self, selector: Selector, ids: Tensor) -> Tensor:
        """Every rank scores all samples: that is arithmetic on numbers that all ranks have."""
        table = SignalTable(ids, self.signals.domain_ids(ids), {"loss": self.losses[ids]})
        scores = contracts.local_scores(selector, table)
        contracts.note_unscored(selector, scores)
        return scores

    def _score_now(self, selector: Selector, ids: Tensor, step: int) -> Tensor:
        table, counts = self.signals.table(selector, ids.numpy(), step)
        return contracts.gather_scores(selector, table, counts, self.collectives)

    def state_dict(self) -> dict[str, Any]:
        """The losses and the steps at which they were computed."""
        return {"losses": self.losses, "measured_at_step": self.measured_at_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.measured_at_step = state["losses"].clone(), state["measured_at_step"].clone()
