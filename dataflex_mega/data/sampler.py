"""Which samples a step trains on: a pure function of (plan, step).

A domain has no shuffled list. Its j-th draw since the run began is row permute(j mod n, n, key(seed, domain, j // n)):
every row once before any row twice, in a new order each epoch, found in O(1). What a plan adds is how many draws of
each domain a step makes (`Apportioner`) and where each domain's count stood when the plan began (`SamplingPlan.cursors`).
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
from dataflex_mega.data.permutation import LARGEST, extend_key, hash_key, permute_each, shuffled_indices
from dataflex_mega.errors import DataError, TrainingFault
from dataflex_mega.rng_streams import RngStream
from dataflex_mega.types import SamplingPlan

MAX_CACHED_PLANS, MAX_CACHED_STEPS = 4, 32


@dataclass
class _CachedPlan:
    """Values derived from a plan once. All arrays but `ids` are [k], one entry per domain."""

    plan: SamplingPlan
    ids: np.ndarray | None  # [m] the selected ids; None: the pool itself
    offsets: np.ndarray  # int64, where a domain begins in `ids`, or its first global id
    sizes: np.ndarray  # int64, its samples in `ids` or in the pool
    keys: np.ndarray  # uint64, of its permutation, the epoch left out
    cursors: np.ndarray  # int64, its draws before the plan began
    steps: OrderedDict[int, Apportioner] = field(default_factory=OrderedDict)  # step -> the state before that step


class Sampler:
    """The order of all samples of a run.

    Args:
        sizes: [k] samples of each domain.
        batch_size: G, samples of a global batch.
        seed: another seed gives another order.

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
        self._plans: OrderedDict[int, _CachedPlan] = OrderedDict()  # by id(), which is unique while the plan is held
        self._lock = threading.Lock()

    # -- what a step draws -----------------------------------------------------------------------------------------

    def global_batch(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[G] int64 global ids of a step, the same for every rank.

        A global id is the domain's offset (the sizes before it) plus the row. The order within the batch is random, so
        that every rank's contiguous part holds all domains alike.

        Raises:
            DataError: the step draws from a domain that has nothing to draw.
            ValueError: step < plan.start_step.
        """
        if plan.ordered_ids is not None:
            return self._ordered_ids(plan, step, step + 1)
        cached, apportioner = self._state_before(plan, step)
        begin = cached.cursors + apportioner.cumulative_counts
        counts = apportioner.next_counts()
        if (counts[cached.sizes == 0] > 0).any():
            domain_id = int(np.flatnonzero((counts > 0) & (cached.sizes == 0))[0])
            raise DataError(_empty_domain_message(domain_id, plan))
        domain_ids = np.repeat(np.arange(len(counts)), counts)
        draws = np.arange(self.batch_size) + (begin - (np.cumsum(counts) - counts))[domain_ids]
        sizes = cached.sizes[domain_ids]
        epochs = draws // sizes
        keys = extend_key(cached.keys[domain_ids], epochs.astype(np.uint64))
        positions = permute_each(draws - epochs * sizes, sizes, keys) + cached.offsets[domain_ids]
        ids = positions if cached.ids is None else cached.ids[positions]
        return ids[shuffled_indices(self.batch_size, hash_key(self.seed, RngStream.BATCH_ORDER, step))]

    def counts_at(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in this step."""
        if plan.ordered_ids is not None:
            return self._count_by_domain(self._ordered_ids(plan, step, step + 1))
        return self._state_before(plan, step)[1].next_counts()

    def counts_before(self, plan: SamplingPlan, step: int) -> np.ndarray:
        """[k] int64: samples of each domain in the steps plan.start_step .. step - 1."""
        if plan.ordered_ids is not None:
            return self._count_by_domain(self._ordered_ids(plan, plan.start_step, step))
        return self._state_before(plan, step)[1].cumulative_counts.copy()

    # -- plans -----------------------------------------------------------------------------------------------------

    def plan_from(self, plan: SamplingPlan, step: int) -> SamplingPlan:
        """The plan that begins at `step` and draws from there on what this one would."""
        cached, apportioner = self._state_before(plan, step)
        cursors = tuple((cached.cursors + self.counts_before(plan, step)).tolist())
        credits = tuple(apportioner.credits_now().tolist())
        ordered_ids = plan.ordered_ids
        if ordered_ids is not None:
            ordered_ids = ordered_ids[(step - plan.start_step) * self.batch_size :].clone()
        return replace(plan, start_step=step, cursors=cursors, credits=credits, ordered_ids=ordered_ids)

    def with_proportions(
        self,
        plan: SamplingPlan,
        step: int,
        proportions: Sequence[float],
        domain_loss_weights: Sequence[float] | None = None,
    ) -> SamplingPlan:
        """The plan that draws from `step` on from the same samples, in other proportions."""
        weights = None if domain_loss_weights is None else tuple(map(float, domain_loss_weights))
        checked = self._check_proportions(proportions, step)
        return replace(self.plan_from(plan, step), proportions=checked, domain_loss_weights=weights)

    def order_into_steps(self, plan: SamplingPlan, steps: int, ids_by_domain: Sequence[Tensor]) -> Tensor:
        """[steps * G] ids: the plan's first `steps` batches, filled with the given ids in their order.

        Args:
            ids_by_domain: for each domain as many ids as the plan draws from it in these steps.

        The order within each batch is that of `global_batch`.
        """
        batches, begin = [], np.zeros(len(ids_by_domain), np.int64)
        for step in range(plan.start_step, plan.start_step + steps):
            end = begin + self.counts_at(plan, step)
            slices = zip(ids_by_domain, begin, end, strict=True)
            batch = np.concatenate([ids[first:stop].numpy() for ids, first, stop in slices])
            batches.append(batch[shuffled_indices(self.batch_size, hash_key(self.seed, RngStream.BATCH_ORDER, step))])
            begin = end
        return torch.from_numpy(np.concatenate(batches))

    def covers(self, plan: SamplingPlan, step: int) -> bool:
        """Whether the plan has samples for a step; only a plan with ordered ids comes to an end."""
        return plan.ordered_ids is None or len(plan.ordered_ids) >= (step + 1 - plan.start_step) * self.batch_size

    def _ordered_ids(self, plan: SamplingPlan, first: int, end: int) -> np.ndarray:
        """The ids of the steps first .. end - 1 of a plan with ordered ids."""
        assert plan.ordered_ids is not None
        if first < plan.start_step:
            raise ValueError(f"step {first} is before the plan's start {plan.start_step}")
        if end > first and not self.covers(plan, end - 1):
            raise DataError(f"step {end}: the order that begins at step {plan.start_step + 1} has no more samples")
        size = self.batch_size
        return plan.ordered_ids[(first - plan.start_step) * size : (end - plan.start_step) * size].numpy()

    def _count_by_domain(self, ids: np.ndarray) -> np.ndarray:
        """[n] global ids -> [k] int64: how many of them are in each domain."""
        domain_ids = np.searchsorted(self.offsets, ids, side="right") - 1
        return np.bincount(domain_ids, minlength=len(self.sizes))

    def next_plan(
        self,
        previous: SamplingPlan | None,
        step: int,
        proportions: Sequence[float] | None,
        selected_ids: Tensor | None = None,
        domain_loss_weights: Sequence[float] | None = None,
        phase: str = "train",
    ) -> SamplingPlan:
        """A plan from `step` on that continues the draws of `previous`.

        Args:
            previous: None for the first plan of a run.
            step: where the new plan starts, >= previous.start_step.
            proportions: [k], sums to 1. None with `selected_ids`: each domain's fraction of these, and no credit, so
                that every selected id is drawn exactly once in len(selected_ids) / G steps.
            selected_ids: [m] int64 sorted global ids to draw from, duplicates allowed; None for the whole pool, which
                continues where it was before any selection.
            domain_loss_weights: [k] for the plan, not used here.
            phase: for the log.

        Raises:
            DataError: nothing was selected, an id is outside the pool, or an empty domain has a proportion.
            TrainingFault: proportions are not finite, non-negative numbers that sum to 1.
            ValueError: selected_ids is not sorted, or neither proportions nor selected_ids is given.
        """
        zeros = (0,) * len(self.sizes)
        pool_cursors, credits = zeros, tuple(map(float, zeros))
        if previous is not None:
            rest = self.plan_from(previous, step)
            pool_cursors, credits = (rest.cursors if rest.selected_ids is None else rest.pool_cursors), rest.credits
        if selected_ids is not None:
            counts = self._count_selected(selected_ids)
            if proportions is None:
                proportions, credits = (counts / counts.sum()).tolist(), tuple(map(float, zeros))
        if proportions is None:
            raise ValueError("proportions are needed when nothing is selected")
        checked = self._check_proportions(proportions, step)
        weights = None if domain_loss_weights is None else tuple(map(float, domain_loss_weights))
        if selected_ids is not None:
            return SamplingPlan(step, checked, zeros, credits, selected_ids, pool_cursors, weights, phase)
        plan = SamplingPlan(step, checked, pool_cursors, credits, domain_loss_weights=weights, phase=phase)
        empty = np.flatnonzero((np.asarray(checked) > 0) & (self.sizes == 0))
        if empty.size:
            raise DataError(_empty_domain_message(int(empty[0]), plan))
        return plan

    def _check_proportions(self, proportions: Sequence[float], step: int) -> tuple[float, ...]:
        values = np.asarray(proportions, np.float64)
        valid = values.shape == self.sizes.shape and np.isfinite(values).all() and (values >= 0).all()
        if not valid or abs(values.sum() - 1) > 1e-6:
            rule = f"{len(self.sizes)} finite numbers >= 0 with sum 1"
            raise TrainingFault(f"proportions of step {step} must be {rule}, found {values.tolist()}")
        return tuple(values.tolist())

    def _count_selected(self, selected_ids: Tensor) -> np.ndarray:
        """[k] int64: how many of the selected ids are in each domain. Raises DataError or ValueError for invalid ids."""
        ids = selected_ids.numpy()
        if ids.size == 0:
            raise DataError("the selection is empty: nothing to train on")
        if (ids[1:] < ids[:-1]).any():
            raise ValueError("selected ids must be sorted")
        if ids[0] < 0 or ids[-1] >= self.offsets[-1]:
            raise DataError(f"selected ids must be in 0..{self.offsets[-1] - 1}, found {ids[0]}..{ids[-1]}")
        return np.diff(np.searchsorted(ids, self.offsets))

    # -- the cache: never changes a result -------------------------------------------------------------------------

    def _state_before(self, plan: SamplingPlan, step: int) -> tuple[_CachedPlan, Apportioner]:
        """The cache entry of the plan, and an apportioner of the caller's own that stands before `step`."""
        if step < plan.start_step:
            raise ValueError(f"step {step} is before the plan's start {plan.start_step}")
        with self._lock:
            cached = self._cached(plan)
            known_step = max((s for s in cached.steps if s <= step), default=None)
            if known_step is None:
                apportioner = Apportioner(plan.proportions, plan.credits, self.batch_size)
            else:
                apportioner = copy.copy(cached.steps[known_step])
            while plan.start_step + apportioner.steps < step:
                apportioner.next_counts()
            cached.steps[step] = copy.copy(apportioner)
            cached.steps.move_to_end(step)
            while len(cached.steps) > MAX_CACHED_STEPS:
                cached.steps.popitem(last=False)
        return cached, apportioner

    def _cached(self, plan: SamplingPlan) -> _CachedPlan:
        cached = self._plans.get(id(plan))
        if cached is None:
            cached = self._build_entry(plan)
            self._plans[id(plan)] = cached
        self._plans.move_to_end(id(plan))
        while len(self._plans) > MAX_CACHED_PLANS:
            self._plans.popitem(last=False)
        return cached

    def _build_entry(self, plan: SamplingPlan) -> _CachedPlan:
        domains = range(len(self.sizes))
        cursors = np.asarray(plan.cursors, np.int64)
        if plan.selected_ids is None:
            keys = [hash_key(self.seed, RngStream.POOL, d) for d in domains]
            return _CachedPlan(plan, None, self.offsets[:-1], self.sizes, np.asarray(keys, np.uint64), cursors)
        ids = plan.selected_ids.numpy()
        offsets = np.searchsorted(ids, self.offsets)
        # The step at which this selection began, also for a later plan of `plan_from`: its cursors began at 0.
        first_step = plan.start_step - sum(plan.cursors) // self.batch_size
        keys = [hash_key(self.seed, RngStream.SELECTION, d, first_step) for d in domains]
        return _CachedPlan(plan, ids, offsets[:-1], np.diff(offsets), np.asarray(keys, np.uint64), cursors)


def _empty_domain_message(domain_id: int, plan: SamplingPlan) -> str:
    where = "the pool" if plan.selected_ids is None else "the selection"
    return f"domain {domain_id} has proportion {plan.proportions[domain_id]:g} but no sample in {where}"
