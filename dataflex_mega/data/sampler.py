"""Which samples a step trains on: a pure function of (plan, step).

A domain has no shuffled list. Its j-th draw since the run began is row permute(j mod n, n, key(seed, domain, j // n)):
every row once before any row twice, in a new order each epoch, found in O(1). What a plan adds is how many draws of
each domain a step takes (`Apportioner`) and where each domain's count stood when the plan began (`Plan.cursor`).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.apportion import Apportioner
from dataflex_mega.data.permutation import LARGEST, extend_key, mix_key, permute_each, shuffled
from dataflex_mega.errors import DataError, TrainingFault
from dataflex_mega.types import Plan

POOL, CHOSEN, ORDER = 1, 2, 3  # streams of random numbers
PLANS_KEPT, STEPS_KEPT = 4, 32  # of the cache


@dataclass
class _Prepared:
    """What is derived from a plan once. All arrays are [k]."""

    plan: Plan
    ids: np.ndarray | None  # [m] the chosen ids; None: the pool itself
    first: np.ndarray  # int64, where a domain begins in `ids`, or its first global id
    size: np.ndarray  # int64, how many it has there
    key: np.ndarray  # uint64
    cursor: np.ndarray  # int64
    steps: OrderedDict[int, Apportioner] = field(default_factory=OrderedDict)  # step -> its state before that step


class Sampler:
    """The order of all samples of a run.

    Args:
        sizes: [k] samples of each domain.
        batch_size: G, samples of a global batch.
        seed: names the order.

    Raises:
        DataError: no domain, a negative size, or more samples than 2**62.
        ValueError: batch_size < 1.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int) -> None:
        if not len(sizes) or min(sizes) < 0 or sum(sizes) > LARGEST:
            raise DataError(f"dataset sizes must be >= 0, at least one, at most 2**62 in all; found {list(sizes)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, found {batch_size}")
        self.sizes = np.asarray(sizes, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self._plans: OrderedDict[int, _Prepared] = OrderedDict()  # by id(); _Prepared keeps the plan alive
        self._lock = threading.Lock()

    # -- what a step draws -----------------------------------------------------------------------------------------

    def global_batch(self, plan: Plan, step: int) -> np.ndarray:
        """[G] int64 global ids of a step, the same for every rank.

        A global id is the domain's offset (the sizes before it) plus the row. The order within the batch is random, so
        that contiguous shares for ranks hold all domains alike.

        Raises:
            DataError: the step draws from a domain that has nothing to draw.
            ValueError: step < plan.start.
        """
        if plan.order is not None:
            return self._from_order(plan, step, step + 1)
        ready, state = self._before(plan, step)
        begin = ready.cursor + state.drawn
        counts = state.counts()
        if (counts[ready.size == 0] > 0).any():
            index = int(np.flatnonzero((counts > 0) & (ready.size == 0))[0])
            raise DataError(_nothing_to_draw(index, plan))
        domain = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(self.batch_size) + (begin - (np.cumsum(counts) - counts))[domain]
        size = ready.size[domain]
        epoch = nth // size
        key = extend_key(ready.key[domain], epoch.astype(np.uint64))
        place = permute_each(nth - epoch * size, size, key) + ready.first[domain]
        ids = place if ready.ids is None else ready.ids[place]
        return ids[shuffled(self.batch_size, mix_key(self.seed, ORDER, step))]

    def counts(self, plan: Plan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in this step."""
        if plan.order is not None:
            return self._by_domain(self._from_order(plan, step, step + 1))
        return self._before(plan, step)[1].counts()

    def drawn(self, plan: Plan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in the steps plan.start .. step - 1."""
        if plan.order is not None:
            return self._by_domain(self._from_order(plan, plan.start, step))
        return self._before(plan, step)[1].drawn.copy()

    # -- plans -----------------------------------------------------------------------------------------------------

    def advance(self, plan: Plan, step: int) -> Plan:
        """The plan that goes on from `step` exactly as this one would."""
        ready, state = self._before(plan, step)
        cursor = tuple((ready.cursor + self.drawn(plan, step)).tolist())
        order = None if plan.order is None else plan.order[(step - plan.start) * self.batch_size :].clone()
        return replace(plan, start=step, cursor=cursor, credit=tuple(state.credit_now().tolist()), order=order)

    def reshare(
        self, plan: Plan, step: int, proportions: Sequence[float], loss_weights: Sequence[float] | None = None
    ) -> Plan:
        """The plan that draws on from `step` from the same samples, in other proportions."""
        weights = None if loss_weights is None else tuple(map(float, loss_weights))
        return replace(self.advance(plan, step), proportions=self._checked(proportions, step), loss_weights=weights)

    def laid_out(self, plan: Plan, steps: int, parts: Sequence[Tensor]) -> Tensor:
        """[steps * G] ids: what the plan draws from its start on, with the samples of `parts` in their order.

        Args:
            parts: for each domain the ids that it gives, as many as the plan draws of it in these steps.

        The order within each batch is as `global_batch` has it.
        """
        order, begin = [], np.zeros(len(parts), np.int64)
        for step in range(plan.start, plan.start + steps):
            end = begin + self.counts(plan, step)
            batch = np.concatenate([part[a:b].numpy() for part, a, b in zip(parts, begin, end, strict=True)])
            order.append(batch[shuffled(self.batch_size, mix_key(self.seed, ORDER, step))])
            begin = end
        return torch.from_numpy(np.concatenate(order))

    def serves(self, plan: Plan, step: int) -> bool:
        """Whether the plan has samples for a step; only one with an order comes to an end."""
        return plan.order is None or len(plan.order) >= (step + 1 - plan.start) * self.batch_size

    def _from_order(self, plan: Plan, first: int, end: int) -> np.ndarray:
        """The ids of the steps first .. end - 1."""
        assert plan.order is not None
        if first < plan.start:
            raise ValueError(f"step {first} is before the plan's start {plan.start}")
        if end > first and not self.serves(plan, end - 1):
            raise DataError(f"step {end}: the order that begins at step {plan.start + 1} has no more samples")
        size = self.batch_size
        return plan.order[(first - plan.start) * size : (end - plan.start) * size].numpy()

    def _by_domain(self, ids: np.ndarray) -> np.ndarray:
        """[k] int64."""
        domain = np.searchsorted(self.offsets, ids, side="right") - 1
        return np.bincount(domain, minlength=len(self.sizes))

    def next_plan(
        self,
        previous: Plan | None,
        step: int,
        proportions: Sequence[float] | None,
        chosen: Tensor | None = None,
        loss_weights: Sequence[float] | None = None,
        phase: str = "train",
    ) -> Plan:
        """A plan from `step` on that continues what `previous` has drawn by then.

        Args:
            previous: None for the first plan of a run.
            step: where the new plan starts, >= previous.start.
            proportions: [k], sums to 1. None with `chosen`: each domain's share of the chosen, and no credit, so
                that every chosen id is drawn exactly once in len(chosen) / G steps.
            chosen: [m] int64 sorted global ids to draw from, duplicates allowed; None for the whole pool, which goes
                on where it stood before any selection.
            loss_weights: [k] for the plan, not used here.
            phase: for the log.

        Raises:
            DataError: nothing was chosen, an id is outside the pool, or an empty domain has a proportion.
            TrainingFault: proportions are not finite, non-negative numbers that sum to 1.
            ValueError: chosen is not sorted, or neither proportions nor chosen is given.
        """
        zeros = (0,) * len(self.sizes)
        pool_cursor, credit = zeros, tuple(map(float, zeros))
        if previous is not None:
            moved = self.advance(previous, step)
            pool_cursor, credit = (moved.cursor if moved.chosen is None else moved.pool_cursor), moved.credit
        if chosen is not None:
            found = self._count_chosen(chosen)
            if proportions is None:
                proportions, credit = (found / found.sum()).tolist(), tuple(map(float, zeros))
        if proportions is None:
            raise ValueError("proportions are needed when nothing is chosen")
        shares = self._checked(proportions, step)
        weights = None if loss_weights is None else tuple(map(float, loss_weights))
        if chosen is not None:
            return Plan(step, shares, zeros, credit, chosen, pool_cursor, weights, phase)
        plan = Plan(step, shares, pool_cursor, credit, loss_weights=weights, phase=phase)
        empty = np.flatnonzero((np.asarray(shares) > 0) & (self.sizes == 0))
        if empty.size:
            raise DataError(_nothing_to_draw(int(empty[0]), plan))
        return plan

    def _checked(self, proportions: Sequence[float], step: int) -> tuple[float, ...]:
        shares = np.asarray(proportions, np.float64)
        good = shares.shape == self.sizes.shape and np.isfinite(shares).all() and (shares >= 0).all()
        if not good or abs(shares.sum() - 1) > 1e-6:
            rule = f"{len(self.sizes)} finite numbers >= 0 with sum 1"
            raise TrainingFault(f"proportions of step {step} must be {rule}, found {shares.tolist()}")
        return tuple(shares.tolist())

    def _count_chosen(self, chosen: Tensor) -> np.ndarray:
        """[k] int64: how many of the chosen are in each domain."""
        ids = chosen.numpy()
        if ids.size == 0:
            raise DataError("the selection is empty: nothing to train on")
        if (ids[1:] < ids[:-1]).any():
            raise ValueError("chosen ids must be sorted")
        if ids[0] < 0 or ids[-1] >= self.offsets[-1]:
            raise DataError(f"chosen ids must be in 0..{self.offsets[-1] - 1}, found {ids[0]}..{ids[-1]}")
        return np.diff(np.searchsorted(ids, self.offsets))

    # -- the cache: never changes a result -------------------------------------------------------------------------

    def _before(self, plan: Plan, step: int) -> tuple[_Prepared, Apportioner]:
        """What is derived from the plan, and a private copy of its counts before `step`."""
        if step < plan.start:
            raise ValueError(f"step {step} is before the plan's start {plan.start}")
        with self._lock:
            ready = self._prepared(plan)
            known = max((s for s in ready.steps if s <= step), default=None)
            if known is None:
                state = Apportioner(plan.proportions, plan.credit, self.batch_size)
            else:
                state = copy.copy(ready.steps[known])
            while plan.start + state.steps < step:
                state.counts()
            ready.steps[step] = copy.copy(state)
            ready.steps.move_to_end(step)
            while len(ready.steps) > STEPS_KEPT:
                ready.steps.popitem(last=False)
        return ready, state

    def _prepared(self, plan: Plan) -> _Prepared:
        ready = self._plans.get(id(plan))
        if ready is None:
            ready = self._prepare(plan)
            self._plans[id(plan)] = ready
        self._plans.move_to_end(id(plan))
        while len(self._plans) > PLANS_KEPT:
            self._plans.popitem(last=False)
        return ready

    def _prepare(self, plan: Plan) -> _Prepared:
        domains = range(len(self.sizes))
        cursor = np.asarray(plan.cursor, np.int64)
        if plan.chosen is None:
            key = [mix_key(self.seed, POOL, d) for d in domains]
            return _Prepared(plan, None, self.offsets[:-1], self.sizes, np.asarray(key, np.uint64), cursor)
        ids = plan.chosen.numpy()
        first = np.searchsorted(ids, self.offsets)
        # The step at which this selection began, also for a plan that was advanced since: its cursors began at 0.
        origin = plan.start - sum(plan.cursor) // self.batch_size
        key = [mix_key(self.seed, CHOSEN, d, origin) for d in domains]
        return _Prepared(plan, ids, first[:-1], np.diff(first), np.asarray(key, np.uint64), cursor)


def _nothing_to_draw(index: int, plan: Plan) -> str:
    where = "the pool" if plan.chosen is None else "the selection"
    return f"domain {index} has proportion {plan.proportions[index]:g} but no sample in {where}"
