"""How many samples of each domain a step gets.

With T_d = credit_d + G p_d t the number of samples that domain d is owed after t steps and C_d the number drawn from it,
every step draws exactly G samples so that |C_d - T_d| < 1 at every step for plans that start without credit.

Why that is possible: call the i-th sample of domain d a unit job that may run from the first step with T_d > i - 1 and
must be done by the first step with T_d >= i. Serving every domain exactly G p_d a step is a fractional schedule that
keeps all these windows, and the assignment of jobs to steps is a flow problem, so a whole-numbered schedule exists too.
Earliest deadline first finds one whenever one exists (unit jobs, whole-numbered windows, G jobs per step; Jackson 1955).
It never draws fewer than G: sum ceil(T_d) - C_d >= G. Done in time, a job keeps C_d >= floor(T_d); not started
early, it keeps C_d <= ceil(T_d). A step needs no queue of jobs: those due now are floor(T_d) - C_d, and beyond them a
domain has at most one job open.

A plan that takes over another's credits may be owed more than a step can give; then the domains furthest behind are
served first, and the bound returns once the debt is paid.

Numbers are integers in units of 2**-44 samples (fewer bits for G > 2**15), so nothing drifts and a state moves to
another plan and back without loss; what is closer than 2**-22 samples to a whole number counts as whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np

FRACTION_BITS = 44
NEAR_BITS = 22
_NEVER = np.iinfo(np.int64).max


@dataclass
class Apportioner:
    """Walks through the steps of one plan.

    Arrays are replaced by every step, never written to, so a shallow copy is a snapshot.

    Args:
        proportions: [k] non-negative, a positive sum (taken relative to it).
        credits: [k] samples owed to each domain at the start, sums to 0.
        batch_size: G >= 1.

    Raises:
        ValueError: an argument breaks these rules.
    """

    proportions: InitVar[Sequence[float]]
    credits: InitVar[Sequence[float]]
    batch_size: int
    steps: int = field(default=0, init=False)
    cumulative_counts: np.ndarray = field(init=False)  # [k] int64, C_d
    _quota: np.ndarray = field(init=False)  # [k] int64, G p_d in units
    _lag: np.ndarray = field(init=False)  # [k] int64, T_d - C_d in units
    _bits: int = field(init=False)

    def __post_init__(self, proportions: Sequence[float], credits: Sequence[float]) -> None:
        p, owed = np.asarray(proportions, np.float64), np.asarray(credits, np.float64)
        if p.ndim != 1 or p.shape != owed.shape or not p.size:
            raise ValueError(f"proportions and credits must have one length >= 1, found {p.shape}, {owed.shape}")
        if not (np.isfinite(p).all() and (p >= 0).all() and p.sum() > 0):
            raise ValueError(f"proportions must be finite, non-negative and not all 0, found {p.tolist()}")
        if not np.isfinite(owed).all() or abs(owed.sum()) > 1e-6:
            raise ValueError(f"credits must be finite and sum to 0, found {owed.tolist()}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, found {self.batch_size}")
        self._bits = min(FRACTION_BITS, 60 - self.batch_size.bit_length())
        one = 1 << self._bits
        self._quota = _round_to_sum(p / p.sum() * self.batch_size * one, self.batch_size * one, p)
        self._lag = _round_to_sum(owed * one, 0, p)
        self.cumulative_counts = np.zeros(len(p), np.int64)

    def next_counts(self) -> np.ndarray:
        """[k] int64, sums to G: the samples that the next step draws from each domain. Advances by that step."""
        near = 1 << (self._bits - NEAR_BITS)
        lag = self._lag + self._quota
        counts = np.maximum((lag + near) >> self._bits, 0)  # due now: floor(T_d) - C_d
        remaining = self.batch_size - int(counts.sum())
        if remaining < 0:
            counts = self._serve_furthest_behind(lag, counts)
        elif remaining > 0:
            open_lag = lag - (counts << self._bits)
            counts[self._by_deadline(open_lag, near)[:remaining]] += 1
        self._lag = lag - (counts << self._bits)
        self.cumulative_counts = self.cumulative_counts + counts
        self.steps += 1
        return counts

    def credits_now(self) -> np.ndarray:
        """[k] float64, sums to 0: the samples each domain is owed after the steps taken. Exact while below 512 samples."""
        return self._lag / (1 << self._bits)

    def _by_deadline(self, lag: np.ndarray, near: int) -> np.ndarray:
        """Domains in the order in which their next job is due: deadline in steps, then larger lag, then index."""
        missing = np.maximum((1 << self._bits) - near - lag, 1)
        deadline = np.where(self._quota > 0, -(-missing // np.maximum(self._quota, 1)), _NEVER - 1)
        deadline = np.where(lag > near, deadline, _NEVER)  # no job open: C_d is ceil(T_d) already
        return np.lexsort((-lag, deadline))

    def _serve_furthest_behind(self, lag: np.ndarray, due: np.ndarray) -> np.ndarray:
        """[k] counts when more is due than G: the jobs of largest lag, each one job less after being served."""
        domain_ids = np.repeat(np.arange(len(due)), due)
        nth = np.arange(len(domain_ids)) - np.repeat(np.cumsum(due) - due, due)
        served = np.argsort(-(lag[domain_ids] - (nth << self._bits)), kind="stable")[: self.batch_size]
        return np.bincount(domain_ids[served], minlength=len(due))


def _round_to_sum(values: np.ndarray, total: int, weight: np.ndarray) -> np.ndarray:
    """Rounded to int64 with the given sum; the difference goes to the entry of largest weight."""
    rounded = np.rint(values).astype(np.int64)
    rounded[np.argmax(weight)] += total - int(rounded.sum())
    return rounded
