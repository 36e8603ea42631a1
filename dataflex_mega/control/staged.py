"""The controller of runs that order samples, and of runs whose roles have update schedules of their own.

Select, then Mix, then Reorder, whatever their order in the configuration: proportions are those of the selected samples,
and what is ordered is what will be trained. At an update of one role it acts on the latest decisions of the others; then a
plan is made up to the next update of any role. A plan that ends early returns its samples, so none is skipped, and none is
trained twice in a pass (see control.passes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import Selector
from dataflex_mega.control.controller import MAX_PLAN_STEPS, DataController
from dataflex_mega.control.loss_cache import LossCache
from dataflex_mega.control.passes import OrderedPasses
from dataflex_mega.control.plan_report import LossCacheView, OrderRecord, PlanReport
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.rng_streams import RngStream
from dataflex_mega.types import SamplingPlan, TrainState, UpdateContext


@dataclass(frozen=True)
class ScoreSource:
    """What samples are ordered by: `fixed` scores, or the scores that `selector` gives them at each reorder."""

    fixed: Tensor | None = None  # [N] float32
    selector: Selector | None = None
    max_samples: int | None = None  # score at most so many, drawn at random; the others take the median
    seed: int = 42


@dataclass(frozen=True)
class StageConfig:
    """How and when the roles act. Every active role has a schedule."""

    schedules: Mapping[str, UpdateSchedule]
    source: ScoreSource = ScoreSource()
    rescore: bool = True  # False: samples are scored once
    score_every: int = 1  # of the reorder's updates
    consume_once: bool = True
    mode: Literal["draw", "filter"] = "draw"  # a selection is the samples of a window, or the pool from then on
    keep_ratio: float = 0.5  # of the pool, in a filter
    max_score_age: Mapping[str, int] = field(default_factory=dict)  # role -> how many steps old a loss may be


@dataclass
class PipelineController(DataController):
    """A controller with a schedule for each role, ordered passes and a loss cache; see the module."""

    stages: StageConfig = field(kw_only=True)
    passes: OrderedPasses | None = field(default=None, kw_only=True)
    selected_ids: Tensor | None = field(default=None, init=False)  # [m] of the last selection
    proportions: tuple[float, ...] | None = field(default=None, init=False)  # the mixer's, None before its first update
    domain_loss_weights: tuple[float, ...] | None = field(default=None, init=False)
    loss_cache: LossCache = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.update_schedule = self.stages.schedules.get("selector", self.update_schedule)
        self.loss_cache = LossCache(self.signal_source, self.collectives, sum(self.domains.num_samples))

    def _algorithms(self) -> dict[str, Any]:
        algorithms, scorer = super()._algorithms(), self.stages.source.selector
        return algorithms if scorer is None else {**algorithms, "reorder_scores": scorer}

    def _is_active(self, role: str, step: int) -> bool:
        """Whether a role has begun to act by `step`."""
        return getattr(self.roles, role) is not None and not self.stages.schedules[role].in_warmup(step)

    def _due_roles(self, step: int) -> set[str]:
        """Selector, mixer, reorder: those that update after `step` steps."""
        roles = [role for role in ("selector", "mixer", "reorder") if getattr(self.roles, role) is not None]
        return {role for role in roles if self.stages.schedules[role].is_update(step)}

    def needs_new_plan(self, state: TrainState) -> bool:
        if self._updates_at(state.step) or not self.sampler.covers(state.plan, state.step):
            return True
        return bool(self._newly_exhausted(state)) or state.step - state.plan.start_step >= MAX_PLAN_STEPS

    def _updates_at(self, step: int) -> bool:
        return bool(self._due_roles(step))

    def _weighter_is_active(self, step: int) -> bool:
        return self._is_active("weighter", step)

    # -- a plan --------------------------------------------------------------------------------------------------

    def _build_plan(self, state: TrainState) -> SamplingPlan:
        step, old = state.step, state.plan
        due = self._due_roles(step)
        self._settle_unused(old, step)
        if "mixer" in due:
            self._run_mixer(step)
        if "selector" in due:
            self._run_selector(step, old)
        if self.passes is not None and self._is_active("reorder", step):
            return self._ordered_plan(self.passes, step, old, due)
        return self._unordered_plan(step, old, due)

    def _settle_unused(self, old: SamplingPlan, step: int) -> None:
        """Tell the passes which samples were trained outside them, and which they served that were not trained."""
        if self.passes is None or (step == old.start_step and old.ordered_ids is None):
            return
        if old.ordered_ids is not None:
            unused = old.ordered_ids[(step - old.start_step) * self.global_batch_size :]
            if len(unused):
                self.passes.return_unused(unused)
            return
        for earlier in range(old.start_step, step):
            self.passes.mark_served(torch.from_numpy(self.sampler.global_batch(old, earlier)))

    def _role_context(self, role: str, step: int) -> UpdateContext:
        return self._update_context(self.stages.schedules[role], step)

    def _run_mixer(self, step: int) -> None:
        assert self.roles.mixer is not None
        context = self._role_context("mixer", step)
        self.proportions, self.domain_loss_weights = self._query_mixer(self.roles.mixer, context)

    def _run_selector(self, step: int, old: SamplingPlan) -> None:
        """Run the selector: choose the samples of the next window (draw) or filter the pool."""
        selector = self.roles.selector
        assert selector is not None
        context = self._role_context("selector", step)
        if self.stages.mode == "draw":
            self.selected_ids = self._select(selector, context, old, self._current_proportions())
        else:
            all_ids = torch.arange(sum(self.domains.num_samples))
            scores = self.loss_cache.score(selector, all_ids, step, self.stages.max_score_age.get("selector", 0))
            scores = selector.combine_updates(all_ids, scores, context)
            count = max(1, int(len(scores) * self.stages.keep_ratio))
            rng = self._rng(step, RngStream.SELECTOR)
            self.selected_ids = selector.select(scores, count, context, rng).unique()
            self._record_selection(step, self.selected_ids, scores[self.selected_ids], scores)
        if self.passes is not None:
            self.passes.restrict_to(self.selected_ids)
            if self.stages.mode == "draw":
                self.passes.restart()

    def _current_proportions(self) -> tuple[float, ...] | None:
        """The proportions in force, None without a mixer."""
        return None if self.roles.mixer is None else self.proportions or self.domains.initial_proportions

    def _drop_empty_domains(self, proportions: tuple[float, ...], counts: list[int]) -> tuple[float, ...]:
        """[k] proportions without the domains that have no sample; theirs go to the others."""
        rest = [p if count else 0.0 for p, count in zip(proportions, counts, strict=True)]
        return proportions if rest == list(proportions) or not sum(rest) else tuple(p / sum(rest) for p in rest)

    def _unordered_plan(self, step: int, old: SamplingPlan, due: set[str]) -> SamplingPlan:
        proportions, loss_weights = self._current_proportions(), self.domain_loss_weights
        if self.selected_ids is None:
            if not due:
                return self.sampler.plan_from(old, step)
            proportions = proportions or self.domains.initial_proportions
            return self.sampler.next_plan(old, step, proportions, domain_loss_weights=loss_weights)
        if proportions is not None:
            proportions = self._drop_empty_domains(proportions, self._selected_per_domain())
        if "selector" in due:
            return self.sampler.next_plan(
                old, step, proportions, selected_ids=self.selected_ids, domain_loss_weights=loss_weights
            )
        if proportions is None or "mixer" not in due:
            return self.sampler.plan_from(old, step)
        return self.sampler.with_proportions(old, step, proportions, loss_weights)

    def _selected_per_domain(self) -> list[int]:
        """[k] counts of the selected samples."""
        assert self.selected_ids is not None
        return self._count_domains(self.selected_ids).tolist()

    def _count_domains(self, ids: Tensor) -> Tensor:
        """[m] ids -> [k] int64, how many of them each domain has."""
        ends = torch.tensor(self.domains.num_samples).cumsum(0)
        return torch.bincount(torch.searchsorted(ends, ids, right=True), minlength=len(ends))

    # -- a plan with an order ------------------------------------------------------------------------------------

    def _ordered_plan(self, passes: OrderedPasses, step: int, old: SamplingPlan, due: set[str]) -> SamplingPlan:
        end = self._next_due_step(step)
        proportions, loss_weights = self._current_proportions(), self.domain_loss_weights
        if "reorder" in due and not self.stages.consume_once:
            passes.restart()
        if proportions is None:
            counts = [(end - step) * self.global_batch_size]
            num_scored = self._refresh_scores(passes, step, due, counts)
            ordered_ids = passes.next_ids(0, counts[0])
            fractions = self._domain_fractions(ordered_ids)
            plan = self.sampler.next_plan(old, step, fractions, domain_loss_weights=loss_weights)
            plan = replace(plan, credits=(0.0,) * len(fractions), ordered_ids=ordered_ids)
        else:
            proportions = self._drop_empty_domains(proportions, passes.sizes())
            plan = self.sampler.next_plan(old, step, proportions, domain_loss_weights=loss_weights)
            counts = self.sampler.counts_before(plan, end).tolist()
            num_scored = self._refresh_scores(passes, step, due, counts)
            ids_per_domain = [passes.next_ids(domain, count) for domain, count in enumerate(counts)]
            plan = replace(plan, ordered_ids=self.sampler.order_into_steps(plan, end - step, ids_per_domain))
        self.last_order_record = self._order_record(passes, plan, end, num_scored)
        return plan

    def _next_due_step(self, step: int) -> int:
        """The next step at which a role updates, at most MAX_PLAN_STEPS away and within the run."""
        last = min(step + MAX_PLAN_STEPS, max(self.total_steps, step + 1))
        return next((later for later in range(step + 1, last) if self._due_roles(later)), last)

    def _domain_fractions(self, ids: Tensor) -> tuple[float, ...]:
        """[m] ids -> [k] fractions of them, which sum to 1."""
        counts = self._count_domains(ids).double()
        return tuple((counts / counts.sum()).tolist())

    def _refresh_scores(self, passes: OrderedPasses, step: int, due: set[str], counts: list[int]) -> int:
        """Bring the scores of the next `counts` samples of each group up to date -> how many samples were scored."""
        source = self.stages.source
        if not passes.pattern.uses_scores:
            return 0
        if source.fixed is not None:
            if passes.scores is None:
                passes.set_scores(source.fixed)
            return 0
        update = self.stages.schedules["reorder"].update_index(step)
        is_due = "selector" in due or ("reorder" in due and update % self.stages.score_every == 0)
        if passes.scores is not None and not (is_due and self.stages.rescore):
            return 0
        assert source.selector is not None
        ids = passes.upcoming_ids(counts)
        scored = self._subsample(ids, source, step)
        scores = torch.full((len(ids),), torch.nan)
        max_age = self.stages.max_score_age.get("reorder", 0)
        new_scores = self.loss_cache.score(source.selector, ids[scored], step, max_age)
        context = self._role_context("reorder", step)
        scores[scored] = source.selector.combine_updates(ids[scored], new_scores, context)
        passes.set_scores(scores, ids)
        return len(scored)

    def _subsample(self, ids: Tensor, source: ScoreSource, step: int) -> Tensor:
        """[m] ascending positions in `ids`, all of them or `max_samples` at random."""
        if source.max_samples is None or len(ids) <= source.max_samples:
            return torch.arange(len(ids))
        rng = self._rng(step, RngStream.SCORE_SUBSET + source.seed)
        return torch.randperm(len(ids), generator=rng)[: source.max_samples].sort().values

    def _order_record(self, passes: OrderedPasses, plan: SamplingPlan, end: int, num_scored: int) -> OrderRecord:
        assert plan.ordered_ids is not None
        scores = passes.scores if passes.pattern.uses_scores else None
        mean = None if scores is None else float(scores[plan.ordered_ids].double().mean())
        return OrderRecord(plan.start_step, end, num_scored, mean, list(passes.num_completed))

    # -- report and restart --------------------------------------------------------------------------------------

    def plan_report(self, state: TrainState) -> PlanReport:
        view = LossCacheView(self.loss_cache.losses, self.loss_cache.measured_at_step)
        return replace(super().plan_report(state), loss_cache=view)

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, with the latest decisions of the roles under "stages"."""
        stages: dict[str, Any] = {
            "proportions": self.proportions,
            "domain_loss_weights": self.domain_loss_weights,
            "selected_ids": self.selected_ids,
        }
        if self.passes is not None:
            stages["passes"] = self.passes.state_dict()
        if any(self.stages.max_score_age.values()):
            stages["loss_cache"] = self.loss_cache.state_dict()
        return {**super().state_dict(), "stages": stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({name: value for name, value in state.items() if name != "stages"})
        stages = state.get("stages", {})
        self.proportions, self.domain_loss_weights = (
            None if stages.get(name) is None else tuple(stages[name]) for name in ("proportions", "domain_loss_weights")
        )
        self.selected_ids = stages.get("selected_ids")
        if self.passes is not None and "passes" in stages:
            self.passes.load_state_dict(stages["passes"])
        if "loss_cache" in stages:
            self.loss_cache.load_state_dict(stages["loss_cache"])
