"""Selects by how much the loss has fallen since the first update: a window slides from the most to the least improved.

DataFlex's rule (arXiv 2603.26164); it has no other paper. The first update stores the loss l0 of every candidate and
selects at random. From then on, with d = l0 - l sorted downwards over N candidates, x in 0..1 the progress of the updates
and w the window's fraction:

    start = floor(s (1 - w) N),  s = 1 / (1 + exp(-10 (x - 1/2)));  end = start + w N, but not beyond the last d >= 0

A sample inside has weight 1, one outside `outside_weight`; samples are drawn one after the other without replacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Range, Selector
from dataflex_mega.algorithms.requests import LossSignal, Request
from dataflex_mega.algorithms.selectors._sampling import draw_without_replacement
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import SignalTable, UpdateContext

SIGMOID_STEEPNESS = 10.0  # of the window's start over the progress of training


def training_progress(context: UpdateContext) -> float:
    """x of an update, 0..1: its number over the last one's, or the fraction of steps done where updates have no end."""
    if context.total_updates > 0:
        return min(1.0, context.update_index / max(1, context.total_updates - 1))
    return min(1.0, context.step / max(1, context.total_steps))


def window_bounds(num_candidates: int, num_improved: int, progress: float, window_size: float) -> tuple[int, int]:
    """(start, end) of the window over sorted deltas; empty when end <= start.

    Args:
        num_candidates: N, those with a finite delta.
        num_improved: how many deltas are >= 0.
        progress: of training, 0..1.
        window_size: the window's fraction of the candidates.
    """
    sigmoid_denominator = 1 + math.exp(-SIGMOID_STEEPNESS * (progress - 0.5))
    start = math.floor((1 - window_size) * num_candidates / sigmoid_denominator)
    return start, min(start + max(1, round(window_size * num_candidates)), num_improved)


def window_weights(deltas: Tensor, progress: float, window_size: float, outside_weight: float) -> Tensor:
    """[N] deltas -> [N] float64: 1 in the window, `outside_weight` elsewhere, 0 where a delta is NaN or infinite."""
    deltas = deltas.double()
    finite = torch.isfinite(deltas)
    ranked = deltas.masked_fill(~finite, -math.inf).sort(descending=True, stable=True).indices
    num_improved = int((finite & (deltas >= 0)).sum())
    start, end = window_bounds(int(finite.sum()), num_improved, progress, window_size)
    weights = torch.full_like(deltas, outside_weight)
    weights[ranked[start:end]] = 1.0
    return weights * finite


@dataclass
class DeltaLoss(Selector):
    """Chance by the fall of the loss.

    Args:
        window_size: the window's fraction of the candidates, 0 < window_size <= 1.
        outside_weight: the weight of a sample outside the window, 0 < outside_weight <= 1; one inside weighs 1.
    """

    window_size: Annotated[float, Range(gt=0, le=1)] = 0.2
    outside_weight: Annotated[float, Range(gt=0, le=1)] = 0.025
    _pool_size: int = field(default=0, init=False, repr=False)
    _initial: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] float32
    _first_step: int = field(default=-1, init=False, repr=False)  # the step of the first update

    def setup(self, domains: DomainInfo) -> None:
        """Record the size of the pool."""
        self._pool_size = sum(domains.num_samples)

    def requests(self) -> tuple[Request, ...]:
        return (LossSignal(),)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32 losses; `select`, which sees the whole pool, subtracts them from the stored ones."""
        return table["loss"].float()

    def select(self, scores: Tensor, count: int, context: UpdateContext, rng: torch.Generator) -> Tensor:
        """[count] int64 positions, drawn without replacement.

        The first update, and a repetition of it at the same step, stores the losses and gives every sample with a finite
        loss the same chance. So does an empty window (no sample so far down has improved).

        Raises:
            ConfigError: the scores are not those of the whole pool, so the run mixes several domains.
            DataError: count exceeds the number of candidates with a finite loss, both now and at the first update.
        """
        if len(scores) != self._pool_size:
            found = f"found {len(scores)} of {self._pool_size} candidates"
            raise ConfigError(f"selector.delta_loss: compares the whole pool, so no mixer may stand beside it; {found}")
        if self._initial is None or context.step == self._first_step:
            self._initial, self._first_step = scores.float().clone(), context.step
            weights = torch.isfinite(scores).double()
        else:
            deltas = self._initial.double() - scores.double()
            weights = window_weights(deltas, training_progress(context), self.window_size, self.outside_weight)
        possible = int((weights > 0).sum())
        if count > possible:
            found = f"{count} samples wanted of {len(scores)} candidates, {possible} with a finite loss"
            raise DataError(f"selector.delta_loss: {found}; shorten update_step")
        return draw_without_replacement(weights.log(), count, rng)

    def state_dict(self) -> dict[str, Any]:
        """The losses of the first update and its step; nothing before it."""
        return {} if self._initial is None else {"initial": self._initial, "first_step": self._first_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the stored losses are of another number of samples."""
        if not state:
            return
        if len(state["initial"]) != self._pool_size:
            found = f"{len(state['initial'])} samples, this run has {self._pool_size}"
            raise CheckpointError(f"the checkpoint's delta_loss losses are of {found}")
        self._initial, self._first_step = state["initial"].float().clone(), int(state["first_step"])
