"""ICONS: samples that many tasks agree on, by votes.

Wu et al. 2025, "ICONS: Influence Consensus for Vision-Language Data Selection" (arXiv 2501.00654). With I_t(i) the mean
cosine of a candidate's gradient with those of task t's target samples, as LESS has it, and k of N candidates to select:

    vote_t(i) = 1 where I_t(i) >= the quantile of I_t at 1 - k / N
    the k candidates with the most votes; of those with equally many, the ones with the highest mean of I_t

Votes are whole numbers, so many candidates have equally many; the paper does not say which of them are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import NotEmpty, Range, Selector
from dataflex_mega.algorithms.requests import GradientSignal, Request
from dataflex_mega.algorithms.selectors._ranking import cosines
from dataflex_mega.errors import DataError
from dataflex_mega.types import SignalTable, UpdateContext


def task_votes(influence: Tensor, count: int) -> Tensor:
    """[N, T] influences, none of them NaN -> [N] int64: for how many tasks a candidate is among the best `count`."""
    ordered = influence.double().sort(dim=0).values
    position = (1 - count / len(ordered)) * (len(ordered) - 1)
    below, above = math.floor(position), math.ceil(position)
    low = ordered[below]
    threshold = torch.where(torch.isfinite(low), low + (position - below) * (ordered[above] - low), ordered[above])
    return (influence.double() >= threshold).sum(dim=1)


@dataclass
class Icons(Selector):
    """The candidates with the most votes.

    A task is an evaluation set (`eval_on_each_dataset: true` keeps them apart), or a part of them by `task_boundaries`.

    Args:
        gradient_type: "adam" preconditions the candidates' gradients, "sgd" does not. Targets are never preconditioned.
        task_boundaries: sizes of the tasks, which sum to the number of evaluation samples; None: each set is a task.
    """

    gradient_type: Literal["adam", "sgd"] = "adam"
    task_boundaries: Annotated[list[int] | None, Range(ge=1), NotEmpty()] = None

    def requests(self) -> tuple[Request, ...]:
        boundaries = None if self.task_boundaries is None else tuple(self.task_boundaries)
        return (GradientSignal(self.gradient_type == "adam", boundaries),)

    def score(self, table: SignalTable) -> Tensor:
        """[n, T] float32 influences in -1..1; 0 for a candidate without a gradient (no target token in it)."""
        return cosines(table).float()

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] positions, most votes first, then the highest mean influence, then the lower position."""
        if count > len(scores):
            raise DataError(f"selector.icons: {count} samples wanted, {len(scores)} candidates are there")
        influence = torch.where(torch.isfinite(scores), scores, -torch.inf)
        by_mean = influence.double().mean(dim=1).sort(descending=True, stable=True).indices
        votes = task_votes(influence, count)
        return by_mean[votes[by_mean].sort(descending=True, stable=True).indices[:count]]
