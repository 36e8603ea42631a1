"""Decides when to re-plan, hands algorithms signals that are already reduced, and checks that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Domains, Mixer, Reorder, Selector, Weighter
from dataflex_mega.control.domain_weights import StepFactors, all_alike, domain_factors, product
from dataflex_mega.errors import CheckpointError, TrainingFault
from dataflex_mega.types import (
    Clock,
    HiddenSpec,
    NeedsBatchGradients,
    NeedsGradients,
    NeedsHidden,
    Plan,
    SampleObs,
    SignalTable,
    StepStats,
    StepWeighing,
    TokenChoice,
    TokenWeigh,
    TrainState,
    Weigh,
)

MIX, SELECT = 1, 2  # random streams
LOOKAHEAD = 64  # steps; nothing is prepared further ahead
MAX_PLAN_STEPS = 4096  # a plan is continued as a new one after so many steps, which bounds any replay of it


class Planner(Protocol):
    """What the controller needs of data.Sampler."""

    def next_plan(
        self,
        previous: Plan | None,
        step: int,
        proportions: Any,
        chosen: Tensor | None = None,
        loss_weights: Any = None,
        phase: str = "train",
    ) -> Plan: ...
    def drawn(self, plan: Plan, step: int) -> np.ndarray: ...
    def global_batch(self, plan: Plan, step: int) -> np.ndarray: ...
    def counts(self, plan: Plan, step: int) -> np.ndarray: ...
    def advance(self, plan: Plan, step: int) -> Plan: ...


class Ranks(Protocol):
    """What the controller needs of distributed.Collectives."""

    def gather(self, rows: Tensor) -> Tensor: ...
    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor: ...
    def own(self, gathered: Tensor, count: int) -> Tensor: ...
    def agree(self, text: str, what: str) -> None: ...


class Scores(Protocol):
    """What the controller needs of signals.Scorer."""

    step: int  # optimizer steps done when signals are asked for

    def consider(self, ids: np.ndarray) -> None: ...
    def shares(self) -> list[int]: ...
    def table(self, needs: frozenset[str]) -> SignalTable: ...


class Parts(Protocol):
    """What the controller needs of data.Candidates."""

    def ids(self, update: int, least: Any = None) -> np.ndarray: ...
    def merge(self, ids: np.ndarray, scores: Tensor) -> tuple[Tensor, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


class When(Protocol):
    """What the controller needs of schedule.Schedule."""

    @property
    def every(self) -> int: ...
    def is_update(self, step: int) -> bool: ...
    def starts_warmup(self, step: int) -> bool: ...
    def warming(self, step: int) -> bool: ...
    def update_number(self, step: int) -> int: ...
    def total_updates(self, steps: int) -> int: ...


class Limited(Protocol):
    """What the controller needs of data.Limits."""

    @property
    def counts(self) -> bool: ...
    def apply(self, asked: Any, spent: frozenset[int], step: int) -> tuple[float, ...]: ...
    def spent(self, drawn: Any, coming: Any) -> frozenset[int]: ...


@dataclass(frozen=True)
class Roles:
    """The algorithms that are on. Any combination."""

    selector: Selector | None = None
    mixer: Mixer | None = None
    reorder: Reorder | None = None  # needs a staged.Staged controller
    weighter: Weighter | None = None


@dataclass
class Selection:
    """What a selection did, for the log."""

    step: int
    chosen: Tensor  # [m] ids
    scores: Tensor  # [m] of the chosen; where a selector gives several numbers, their mean
    quantiles: list[float]  # 0, 25, 50, 75, 100 % of the finite scores of all that could be chosen
    overlap: float  # share of the chosen that the selection before had chosen


@dataclass
class Controller:
    """One for a run, the same on every rank."""

    roles: Roles
    domains: Domains
    schedule: When
    sampler: Planner
    ranks: Ranks
    scores: Scores
    global_batch: int
    total_steps: int
    seed: int
    limits: Limited | None = None  # of what a mixer may ask for
    target_mean: Callable[[HiddenSpec, int], Tensor] | None = None  # see signals.hidden.TargetMean
    candidates: Parts | None = None  # None: a selection considers the whole pool
    domain_gram: Callable[[int, bool, int], Tensor] | None = None  # see signals.gram.DomainGram
    batch_gradients: Callable[[np.ndarray, int], tuple[Tensor, Tensor]] | None = None  # see providers.batch_gradients
    rate: Callable[[], float] | None = None  # the engine's learning rate for the step to come
    last_selection: Selection | None = field(default=None, init=False)
    last_order: Any = field(default=None, init=False)  # a staged.Window
    _previous: Tensor | None = field(default=None, init=False)
    _spent: frozenset[int] = field(default=frozenset(), init=False)  # domains that have been drawn max_epochs often

    def __post_init__(self) -> None:
        for algorithm in self._algorithms().values():
            algorithm.setup(self.domains)

    def _algorithms(self) -> dict[str, Any]:
        named = {name: getattr(self.roles, name) for name in ("selector", "mixer", "reorder", "weighter")}
        return {name: algorithm for name, algorithm in named.items() if algorithm is not None}

    # -- plans ---------------------------------------------------------------------------------------------------

    def first_plan(self) -> Plan:
        """Before any step: the whole pool in its initial proportions."""
        phase = "warmup" if self.schedule.warming(0) else "train"
        return self.sampler.next_plan(None, 0, self._allowed(self.domains.initial, 0), phase=phase)

    def due(self, state: TrainState) -> bool:
        """Whether `next_plan` must be asked before the next step."""
        if self._acts(state.step) or self._newly_spent(state):
            return True
        return state.step - state.plan.start >= MAX_PLAN_STEPS

    def plan_end(self, step: int, last: int) -> int:
        """The next step, at most `last`, at which a role makes another plan: what this one would draw there and later is
        not worth preparing. Looks LOOKAHEAD steps ahead."""
        last = min(last, step + LOOKAHEAD)
        return next((later for later in range(step + 1, last) if self._acts(later)), last)

    def _acts(self, step: int) -> bool:
        """Whether a role plans anew after `step` steps."""
        replans = self.roles.selector is not None or self.roles.mixer is not None
        return replans and (self.schedule.is_update(step) or self._restarts_warmup(step))

    def _restarts_warmup(self, step: int) -> bool:
        return self.roles.selector is not None and step > 0 and self.schedule.starts_warmup(step)

    def _newly_spent(self, state: TrainState) -> frozenset[int]:
        """Domains that the coming step would draw more often than max_epochs lets it."""
        if self.limits is None or not self.limits.counts:
            return frozenset()
        drawn = self.sampler.advance(state.plan, state.step).cursor
        return self.limits.spent(drawn, self.sampler.counts(state.plan, state.step))

    def _allowed(self, proportions: tuple[float, ...], step: int) -> tuple[float, ...]:
        return proportions if self.limits is None else self.limits.apply(proportions, self._spent, step)

    def next_plan(self, state: TrainState) -> Plan:
        """Score, choose, mix; the same plan on all ranks, or TrainingFault."""
        plan = self._make_plan(state)
        while found := self._newly_spent(TrainState(state.step, plan)) - self._spent:
            # Its share goes to others, which may be spent by that in turn.
            self._spent |= found
            shares = self._allowed(plan.proportions, state.step)
            plan = self.sampler.next_plan(
                state.plan, state.step, shares, loss_weights=plan.loss_weights, phase=plan.phase
            )
        self.ranks.agree(plan.digest(), f"the plan of step {state.step}")
        return plan

    def _make_plan(self, state: TrainState) -> Plan:
        step, old = state.step, state.plan
        if self._restarts_warmup(step):
            # Without a mixer the old proportions are those of the selection, not of the pool.
            proportions = self.domains.initial if self.roles.mixer is None else old.proportions
            return self.sampler.next_plan(old, step, proportions, phase="warmup")
        if not self.schedule.is_update(step):
            return self.sampler.advance(old, step)
        clock = self._clock_of(self.schedule, step)
        proportions, loss_weights = None, None
        if self.roles.mixer is not None:
            proportions, loss_weights = self._ask(self.roles.mixer, clock)
        if self.roles.selector is None:
            return self.sampler.next_plan(old, step, proportions, loss_weights=loss_weights)
        chosen = self._select(self.roles.selector, clock, old, proportions)
        return self.sampler.next_plan(old, step, proportions, chosen=chosen, loss_weights=loss_weights)

    def _clock_of(self, when: When, step: int) -> Clock:
        update, updates = when.update_number(step), when.total_updates(self.total_steps)
        return Clock(step, self.total_steps, update, self.seed, updates, 0.0 if self.rate is None else self.rate())

    def _ask(self, mixer: Mixer, clock: Clock) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """What a mixer wants from now on: [k] proportions within the limits, and its domain weights of the loss."""
        if isinstance(mixer, NeedsGradients):
            assert self.domain_gram is not None, "given when the run was built"
            mixer.learn(self.domain_gram(mixer.probe_samples, mixer.against == "eval", clock.step))
        asked = tuple(mixer.proportions(clock, self._rng(clock.step, MIX)).double().tolist())
        weights = mixer.loss_weights()
        return self._allowed(asked, clock.step), None if weights is None else tuple(weights.double().tolist())

    def _rng(self, step: int, stream: int) -> torch.Generator:
        """A generator that depends on (seed, step, stream) alone."""
        words = np.random.SeedSequence([self.seed, step, stream]).generate_state(2, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def _select(self, selector: Selector, clock: Clock, old: Plan, proportions: tuple[float, ...] | None) -> Tensor:
        quota = None if proportions is None else self._quota(old, clock.step, proportions)
        ids = None if self.candidates is None else self.candidates.ids(clock.update, quota)
        if ids is not None:
            self.scores.consider(ids)
        self.scores.step = clock.step
        mine = selector.score(self.scores.table(selector.needs)).float()
        scores = self.ranks.gather_uneven(mine, self.scores.shares())
        there = torch.arange(len(scores)) if ids is None else torch.from_numpy(ids)  # ids of what may be chosen
        scores = selector.accumulate(there, scores, clock)
        if self.candidates is not None and ids is not None:
            there, scores = self.candidates.merge(ids, scores)
        rng = self._rng(clock.step, SELECT)
        if quota is None:
            places = selector.choose(scores, self.global_batch * self.schedule.every, clock, rng)
        else:
            places = self._select_by_domain(selector, (there, scores), clock, rng, quota)
        places = places.sort().values
        self._note(clock.step, there[places], scores[places], scores)
        return there[places]

    def _quota(self, old: Plan, step: int, proportions: tuple[float, ...]) -> np.ndarray:
        """[k] how many samples of each domain the coming window draws."""
        plan = self.sampler.next_plan(old, step, proportions)
        return self.sampler.drawn(plan, step + self.schedule.every)

    def _select_by_domain(
        self, selector: Selector, scored: tuple[Tensor, Tensor], clock: Clock, rng: torch.Generator, quota: np.ndarray
    ) -> Tensor:
        """The mixer says how many of each domain, the selector which -> places in `scored` (ids, scores). A domain smaller
        than its quota is taken whole and drawn again and again."""
        ids, scores = scored
        ends = torch.searchsorted(ids, torch.tensor(self.domains.sizes).cumsum(0)).tolist()
        parts, first = [], 0
        for end, count in zip(ends, quota.tolist(), strict=True):
            if count >= end - first:
                parts.append(torch.arange(first, end))
            elif count > 0:
                parts.append(selector.choose(scores[first:end], count, clock, rng) + first)
            first = end
        return torch.cat(parts)

    def _note(self, step: int, chosen: Tensor, own: Tensor, scores: Tensor) -> None:
        """`own`: scores of the [m] chosen ids. `scores`: of all that could be chosen."""
        if scores.dim() > 1:
            own, scores = own.mean(dim=1), scores.mean(dim=1)
        finite = scores[torch.isfinite(scores)].sort().values
        places = [round(q * (len(finite) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)] if len(finite) else []
        overlap = 0.0
        if self._previous is not None and len(chosen):
            overlap = float(torch.isin(chosen, self._previous).double().mean())
        self.last_selection = Selection(step, chosen, own, finite[places].tolist(), overlap)
        self._previous = chosen

    # -- weights -------------------------------------------------------------------------------------------------

    def weigher(self, state: TrainState) -> Weigh | None:
        """The function that weighs the samples of the next step, or None when all weigh the same."""
        weighter = self.roles.weighter if self._weighs(state.step) else None
        if isinstance(weighter, NeedsHidden) and weighter.stale(state.step):
            assert self.target_mean is not None, "checked when the run was built"
            weighter.learn(self.target_mean(weighter.hidden, weighter.target_samples), state.step)
        if isinstance(weighter, NeedsBatchGradients):
            assert self.batch_gradients is not None, "made when the run was built"
            ids = self.sampler.global_batch(state.plan, state.step)
            weighter.look(torch.from_numpy(ids), *self.batch_gradients(ids, state.step))
        by_sample = self._by_sample(weighter, state)
        if isinstance(weighter, TokenChoice):
            return TokenWeigh(by_sample or all_alike, weighter)
        return by_sample

    def _weighs(self, step: int) -> bool:
        return not self.schedule.warming(step)

    def _by_sample(self, weighter: Weighter | None, state: TrainState) -> Weigh | None:
        mixer = self.roles.mixer
        if isinstance(mixer, StepWeighing) and state.plan.loss_weights is not None:
            by_step = StepFactors(
                mixer.domain_weights(), torch.tensor(state.plan.proportions).double(), mixer.loss_norm
            )
            return by_step if weighter is None else self._weigher(weighter, by_step, state)
        by_domain = domain_factors(state.plan)
        if weighter is None and by_domain is None:
            return None
        return self._weigher(weighter, by_domain, state)

    def _weigher(self, weighter: Weighter | None, by_domain: Tensor | Weigh | None, state: TrainState) -> Weigh:
        """The product of a weighter's weights and those of domains: [k] factors, or a function of samples."""

        def weigh(obs: SampleObs) -> Tensor:
            if isinstance(weighter, NeedsHidden):
                if obs.hidden is None:
                    raise TrainingFault("weights by hidden states need SampleObs.hidden, which the engine did not give")
                obs = replace(obs, hidden=weighter.compare(obs.hidden))
            whole = SampleObs(**{name: self.ranks.gather(rows) for name, rows in obs.weighed().items()})
            weights = torch.ones_like(whole.loss_sum)
            if isinstance(by_domain, Tensor):
                weights = by_domain.to(weights)[whole.domain]
            elif by_domain is not None:
                weights = by_domain(replace(whole, step_count=obs.step_count))
            if weighter is not None:
                own = weighter.weights(whole, state.step, self.total_steps).to(weights)
                weights = own if by_domain is None else product(own, weights)
            return self.ranks.own(weights, len(obs.sample_id))

        return weigh

    # -- after a step --------------------------------------------------------------------------------------------

    def observe(self, stats: StepStats, state: TrainState) -> None:
        """Hand the reduced sums of the step just done (number state.step) to the mixer."""
        if self.roles.mixer is not None:
            self.roles.mixer.observe(stats, state.plan.proportions, state.step)

    def state(self) -> dict[str, Any]:
        """What algorithms remember, by role; tensors may be anywhere in it."""
        saved: dict[str, Any] = {name: algorithm.state() for name, algorithm in self._algorithms().items()}
        if self._previous is not None:
            saved["previous_selection"] = self._previous
        if self.candidates is not None and (known := self.candidates.state()):
            saved["candidates"] = known
        if self._spent:
            saved["spent_domains"] = sorted(self._spent)
        return saved

    def restore(self, saved: dict[str, Any]) -> None:
        """The inverse of `state`. Raises CheckpointError when another set of roles was on."""
        algorithms = self._algorithms()
        there = set(saved) - {"previous_selection", "spent_domains", "candidates"}
        if there != set(algorithms):
            raise CheckpointError(f"the checkpoint has state of {sorted(there)}, this run needs {sorted(algorithms)}")
        for name, algorithm in algorithms.items():
            algorithm.restore(saved[name])
        if self.candidates is not None:
            self.candidates.restore(saved.get("candidates", {}))
        self._previous = saved.get("previous_selection")
        self._spent = frozenset(saved.get("spent_domains", ()))
