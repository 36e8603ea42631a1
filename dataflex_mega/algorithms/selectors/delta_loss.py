"""Samples by how much their loss has fallen since the first update: a window slides from the most to the least improved.

DataFlex's rule (arXiv 2603.26164); it has no other paper. The first update stores the loss l0 of every candidate and
chooses at random. From then on, with d = l0 - l sorted downwards over N candidates, x in 0..1 the progress of the updates
and w the window's share:

    start = floor(s (1 - w) N),  s = 1 / (1 + exp(-10 (x - 1/2)));  end = start + w N, but not beyond the last d >= 0

A sample inside weighs 1, one outside `outside_weight`; samples are drawn one after the other without replacement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Selector
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import Clock, SignalTable

STEEPNESS = 10.0  # of the sigmoid by which the window moves


def progress(clock: Clock) -> float:
    """x of an update, 0..1: its number over the last one's, or the share of steps done where updates have no end."""
    if clock.total_updates > 0:
        return min(1.0, clock.update / max(1, clock.total_updates - 1))
    return min(1.0, clock.step / max(1, clock.total_steps))


def window(candidates: int, improved: int, x: float, size: float) -> tuple[int, int]:
    """First place and the one after the last of the window over sorted deltas; empty when end <= start.

    Args:
        candidates: N, those with a finite delta.
        improved: how many deltas are >= 0.
        x: progress, 0..1.
        size: the window's share of the candidates.
    """
    start = math.floor((1 - size) * candidates / (1 + math.exp(-STEEPNESS * (x - 0.5))))
    return start, min(start + max(1, round(size * candidates)), improved)


def window_weights(deltas: Tensor, x: float, size: float, outside: float) -> Tensor:
    """[N] deltas -> [N] float64: 1 in the window, `outside` elsewhere, 0 where a delta is NaN or infinite."""
    deltas = deltas.double()
    finite = torch.isfinite(deltas)
    ranked = deltas.masked_fill(~finite, -math.inf).sort(descending=True, stable=True).indices
    start, end = window(int(finite.sum()), int((finite & (deltas >= 0)).sum()), x, size)
    weights = torch.full_like(deltas, outside)
    weights[ranked[start:end]] = 1.0
    return weights * finite


@dataclass
class DeltaLoss(Selector):
    """Chance by the fall of the loss.

    Args:
        window_size: the window's share of the candidates, 0 < window_size <= 1.
        outside_weight: what a sample outside the window weighs, 0 < outside_weight <= 1; one inside weighs 1.
        cache_dir: where step_N.json of each selection goes; None: the output directory.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})

    window_size: float = 0.2
    outside_weight: float = 0.025
    cache_dir: str | None = None
    _pool: int = field(default=0, init=False, repr=False)
    _initial: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # [N] float32
    _first_step: int = field(default=-1, init=False, repr=False)  # the step at which it was taken

    def __post_init__(self) -> None:
        for key in ("window_size", "outside_weight"):
            value = getattr(self, key)
            if not 0 < value <= 1:
                raise ConfigError(f"selector.delta_loss.{key}: must be > 0 and <= 1, found {value}")

    def setup(self, domains: Domains) -> None:
        """Notes the size of the pool."""
        self._pool = sum(domains.sizes)

    def score(self, table: SignalTable) -> Tensor:
        """[n] float32: the losses of now; `choose`, which sees the whole pool, takes them from the stored ones."""
        return table["loss"].float()

    def choose(self, scores: Tensor, count: int, clock: Clock, rng: torch.Generator) -> Tensor:
        """[count] int64 positions, the largest of log weight + Gumbel noise (Yellott 1977).

        The first update, and a repetition of it at the same step, stores the losses and gives every sample with a finite
        one the same chance. An empty window (no sample so far down has improved) does so too.

        Raises:
            ConfigError: the scores are not those of the whole pool, so a mixer of several domains is on.
            DataError: count is more than there are candidates with a finite loss, now and at the first update.
        """
        if len(scores) != self._pool:
            found = f"found {len(scores)} of {self._pool} candidates"
            raise ConfigError(f"selector.delta_loss: compares the whole pool, so no mixer may stand beside it; {found}")
        if self._initial is None or clock.step == self._first_step:
            self._initial, self._first_step = scores.float().clone(), clock.step
            weights = torch.isfinite(scores).double()
        else:
            deltas = self._initial.double() - scores.double()
            weights = window_weights(deltas, progress(clock), self.window_size, self.outside_weight)
        possible = int((weights > 0).sum())
        if count > possible:
            found = f"{count} samples wanted of {len(scores)} candidates, {possible} with a finite loss"
            raise DataError(f"selector.delta_loss: {found}; shorten update_step")
        uniform = torch.rand(len(scores), generator=rng, dtype=torch.float64)
        waiting = -torch.log1p(-uniform)  # exponential, so -log of it is Gumbel
        keys = torch.where(weights > 0, weights.log() - waiting.log(), -math.inf)
        return keys.sort(descending=True, stable=True).indices[:count]

    def state(self) -> dict[str, Any]:
        """The losses of the first update and its step; nothing before it."""
        return {} if self._initial is None else {"initial": self._initial, "first_step": self._first_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError when the stored losses are of another number of samples."""
        if not state:
            return
        if len(state["initial"]) != self._pool:
            found = f"{len(state['initial'])} samples, this run has {self._pool}"
            raise CheckpointError(f"the checkpoint's delta_loss losses are of {found}")
        self._initial, self._first_step = state["initial"].float().clone(), int(state["first_step"])
