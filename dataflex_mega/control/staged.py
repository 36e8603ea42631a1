"""The controller of runs that order samples, and of those whose roles act on clocks of their own.

Select, then Mix, then Reorder, whatever their order in the configuration: proportions are those of samples that were kept,
and what is ordered is what will be trained. At a step at which one of them is due it acts on what the others decided when
they were last due; then a plan is made up to the next such step. A plan that ends early gives its samples back, so none is
skipped, and none is trained twice in a pass (see ordering).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.control.controller import MAX_PLAN_STEPS, SELECT, Controller, When
from dataflex_mega.control.loss_cache import Board
from dataflex_mega.control.passes import Ordering
from dataflex_mega.types import Clock, Plan, TrainState

SCORE = 3  # random stream


class Orders(Protocol):
    """What is needed of data.Sampler beyond controller.Planner."""

    def global_batch(self, plan: Plan, step: int) -> Any: ...
    def reshare(self, plan: Plan, step: int, proportions: Any, loss_weights: Any = None) -> Plan: ...
    def laid_out(self, plan: Plan, steps: int, parts: Any) -> Tensor: ...
    def serves(self, plan: Plan, step: int) -> bool: ...


@dataclass(frozen=True)
class Source:
    """What samples are ordered by: `fixed` scores, or what `selector` scores when they are ordered."""

    fixed: Tensor | None = None  # [N] float32
    selector: Selector | None = None
    max_samples: int | None = None  # score at most so many, drawn at random; the others take the median
    seed: int = 42


@dataclass(frozen=True)
class Stages:
    """How and when the roles act. A role that is on has a clock."""

    clocks: Mapping[str, When]
    source: Source = Source()
    rescore: bool = True  # False: scores are those of the first time
    score_every: int = 1  # of the reorder's updates
    consume_once: bool = True
    mode: Literal["draw", "filter"] = "draw"  # a selection is the samples of a window, or the pool of what follows
    keep_ratio: float = 0.5  # of the pool, in a filter
    max_age: Mapping[str, int] = field(default_factory=dict)  # role -> how many steps old a loss may be


@dataclass
class Window:
    """What an order was, for the log."""

    step: int
    end: int  # the first step after it
    scored: int  # samples scored for it
    mean_score: float | None  # of its samples; None where no scores are read
    passes: list[int]  # begun before, by domain with a mixer


@dataclass
class Staged(Controller):
    """See the module."""

    stages: Stages = field(kw_only=True)
    ordering: Ordering | None = field(default=None, kw_only=True)
    kept: Tensor | None = field(default=None, init=False)  # [m] ids of the last selection
    shares: tuple[float, ...] | None = field(default=None, init=False)  # the mixer's, once it has set some
    loss_weights: tuple[float, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.schedule = self.stages.clocks.get("selector", self.schedule)
        self.board = Board(self.scores, self.ranks, sum(self.domains.sizes))  # type: ignore[arg-type]  # a Scorer

    @property
    def orders(self) -> Orders:
        """The sampler."""
        return self.sampler  # type: ignore[return-value]

    def _algorithms(self) -> dict[str, Any]:
        found, own = super()._algorithms(), self.stages.source.selector
        return found if own is None else {**found, "reorder_scores": own}

    def _on(self, role: str, step: int) -> bool:
        """Whether a role has begun to act by `step`."""
        return getattr(self.roles, role) is not None and not self.stages.clocks[role].warming(step)

    def _due(self, step: int) -> set[str]:
        """Selector, mixer, reorder: those that act after `step` steps."""
        roles = [role for role in ("selector", "mixer", "reorder") if getattr(self.roles, role) is not None]
        return {role for role in roles if self.stages.clocks[role].is_update(step)}

    def due(self, state: TrainState) -> bool:
        """See Controller."""
        if self._acts(state.step) or not self.orders.serves(state.plan, state.step):
            return True
        return bool(self._newly_spent(state)) or state.step - state.plan.start >= MAX_PLAN_STEPS

    def _acts(self, step: int) -> bool:
        return bool(self._due(step))

    def _weighs(self, step: int) -> bool:
        return self._on("weighter", step)

    # -- a plan --------------------------------------------------------------------------------------------------

    def _make_plan(self, state: TrainState) -> Plan:
        step, old = state.step, state.plan
        due = self._due(step)
        self._account(old, step)
        if "mixer" in due:
            self._mix(step)
        if "selector" in due:
            self._keep(step, old)
        if self.ordering is not None and self._on("reorder", step):
            return self._ordered(self.ordering, step, old, due)
        return self._drawn(step, old, due)

    def _account(self, old: Plan, step: int) -> None:
        """The ordering knows what was trained on without it, and what it had handed out for nothing."""
        if self.ordering is None or (step == old.start and old.order is None):
            return
        if old.order is not None:
            unused = old.order[(step - old.start) * self.global_batch :]
            if len(unused):
                self.ordering.give_back(unused)
            return
        for earlier in range(old.start, step):
            self.ordering.used(torch.from_numpy(self.orders.global_batch(old, earlier)))

    def _clock(self, role: str, step: int) -> Clock:
        return self._clock_of(self.stages.clocks[role], step)

    def _mix(self, step: int) -> None:
        assert self.roles.mixer is not None
        self.shares, self.loss_weights = self._ask(self.roles.mixer, self._clock("mixer", step))

    def _keep(self, step: int, old: Plan) -> None:
        """Ask the selector. The samples of its window, or a part of the pool."""
        selector = self.roles.selector
        assert selector is not None
        if self.stages.mode == "draw":
            self.kept = self._select(selector, self._clock("selector", step), old, self._mixture())
        else:
            everything = torch.arange(sum(self.domains.sizes))
            scores = self.board.score(selector, everything, step, self.stages.max_age.get("selector", 0))
            scores = selector.accumulate(everything, scores, self._clock("selector", step))
            count = max(1, int(len(scores) * self.stages.keep_ratio))
            rng = self._rng(step, SELECT)
            chosen = selector.choose(scores, count, self._clock("selector", step), rng).unique()
            self._note(step, chosen, scores[chosen], scores)
            self.kept = chosen
        if self.ordering is not None:
            self.ordering.limit(self.kept)
            if self.stages.mode == "draw":
                self.ordering.restart()

    def _mixture(self) -> tuple[float, ...] | None:
        """The proportions in force, None without a mixer."""
        return None if self.roles.mixer is None else self.shares or self.domains.initial

    def _possible(self, shares: tuple[float, ...], there: list[int]) -> tuple[float, ...]:
        """Without domains of which nothing is left: they leave their share to the others."""
        left = [share if count else 0.0 for share, count in zip(shares, there, strict=True)]
        return shares if left == list(shares) or not sum(left) else tuple(share / sum(left) for share in left)

    def _drawn(self, step: int, old: Plan, due: set[str]) -> Plan:
        """A plan without an order."""
        shares = self._mixture()
        if self.kept is None:
            if not due:
                return self.sampler.advance(old, step)
            given = shares or self.domains.initial
            return self.sampler.next_plan(old, step, given, loss_weights=self.loss_weights)
        if shares is not None:
            shares = self._possible(shares, self._kept_of_each())
        if "selector" in due:
            return self.sampler.next_plan(old, step, shares, chosen=self.kept, loss_weights=self.loss_weights)
        if shares is None or "mixer" not in due:
            return self.sampler.advance(old, step)
        return self.orders.reshare(old, step, shares, self.loss_weights)

    def _kept_of_each(self) -> list[int]:
        assert self.kept is not None
        ends = torch.tensor(self.domains.sizes).cumsum(0)
        places = torch.searchsorted(ends, self.kept, right=True)
        return torch.bincount(places, minlength=len(ends)).tolist()

    # -- a plan with an order ------------------------------------------------------------------------------------

    def _ordered(self, ordering: Ordering, step: int, old: Plan, due: set[str]) -> Plan:
        end = self._next_due(step)
        shares = self._mixture()
        if "reorder" in due and not self.stages.consume_once:
            ordering.restart()
        if shares is None:
            wanted = [(end - step) * self.global_batch]
            scored = self._score(ordering, step, due, wanted)
            order = ordering.take(0, wanted[0])
            found = self._shares_of(order)
            plan = self.sampler.next_plan(old, step, found, loss_weights=self.loss_weights)
            plan = replace(plan, credit=(0.0,) * len(found), order=order)
        else:
            possible = self._possible(shares, ordering.sizes())
            plan = self.sampler.next_plan(old, step, possible, loss_weights=self.loss_weights)
            wanted = self.sampler.drawn(plan, end).tolist()
            scored = self._score(ordering, step, due, wanted)
            parts = [ordering.take(domain, count) for domain, count in enumerate(wanted)]
            plan = replace(plan, order=self.orders.laid_out(plan, end - step, parts))
        self.last_order = self._window(ordering, plan, end, scored)
        return plan

    def _next_due(self, step: int) -> int:
        """The next step at which a role acts, at most MAX_PLAN_STEPS away and within the run."""
        last = min(step + MAX_PLAN_STEPS, max(self.total_steps, step + 1))
        return next((later for later in range(step + 1, last) if self._due(later)), last)

    def _shares_of(self, ids: Tensor) -> tuple[float, ...]:
        ends = torch.tensor(self.domains.sizes).cumsum(0)
        counts = torch.bincount(torch.searchsorted(ends, ids, right=True), minlength=len(ends)).double()
        return tuple((counts / counts.sum()).tolist())

    def _score(self, ordering: Ordering, step: int, due: set[str], wanted: list[int]) -> int:
        """Bring the scores up to date -> how many samples were scored."""
        source = self.stages.source
        if not ordering.pattern.reads_scores:
            return 0
        if source.fixed is not None:
            if ordering.scores is None:
                ordering.score(source.fixed)
            return 0
        number = self.stages.clocks["reorder"].update_number(step)
        asked = "selector" in due or ("reorder" in due and number % self.stages.score_every == 0)
        if ordering.scores is not None and not (asked and self.stages.rescore):
            return 0
        assert source.selector is not None
        ids = ordering.coming(wanted)
        some = self._sample(ids, source, step)
        scores = torch.full((len(ids),), torch.nan)
        max_age = self.stages.max_age.get("reorder", 0)
        found = self.board.score(source.selector, ids[some], step, max_age)
        scores[some] = source.selector.accumulate(ids[some], found, self._clock("reorder", step))
        ordering.score(scores, ids)
        return len(some)

    def _sample(self, ids: Tensor, source: Source, step: int) -> Tensor:
        """[m] ascending places in `ids`, all of them or `max_samples` at random."""
        if source.max_samples is None or len(ids) <= source.max_samples:
            return torch.arange(len(ids))
        rng = self._rng(step, SCORE + source.seed)
        return torch.randperm(len(ids), generator=rng)[: source.max_samples].sort().values

    def _window(self, ordering: Ordering, plan: Plan, end: int, scored: int) -> Window:
        assert plan.order is not None
        read = ordering.scores is not None and ordering.pattern.reads_scores
        mean = float(ordering.scores[plan.order].double().mean()) if read and ordering.scores is not None else None
        return Window(plan.start, end, scored, mean, list(ordering.passes))

    # -- restart -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See Controller."""
        own: dict[str, Any] = {"shares": self.shares, "loss_weights": self.loss_weights, "kept": self.kept}
        if self.ordering is not None:
            own["ordering"] = self.ordering.state()
        if any(self.stages.max_age.values()):
            own["board"] = self.board.state()
        return {**super().state(), "stages": own}

    def restore(self, saved: dict[str, Any]) -> None:
        """See Controller."""
        super().restore({name: value for name, value in saved.items() if name != "stages"})
        own = saved.get("stages", {})
        self.shares, self.loss_weights = (
            None if own.get(name) is None else tuple(own[name]) for name in ("shares", "loss_weights")
        )
        self.kept = own.get("kept")
        if self.ordering is not None and "ordering" in own:
            self.ordering.restore(own["ordering"])
        if "board" in own:
            self.board.restore(own["board"])
