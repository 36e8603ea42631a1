"""Decides when to re-plan, hands algorithms signals that are already reduced, and checks that all ranks agree.

Select, then Mix, then Reorder, whatever their order in the configuration: proportions are those of the selected samples,
and what is ordered is what will be trained. At an update of one role it acts on the latest decisions of the others. Without
a pipeline all roles share one schedule, which may repeat its cycle with a warm-up on the whole pool.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Reorder, Selector, Weighter
from dataflex_mega.control import contracts
from dataflex_mega.control.loss_cache import LossCache
from dataflex_mega.control.ordered_plans import OrderedPlanner, count_domains, drop_empty_domains
from dataflex_mega.control.passes import OrderedPasses
from dataflex_mega.control.plan_report import LossCacheView, PlanReport
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.selection import SelectionRunner
from dataflex_mega.control.signal_source import SignalSource
from dataflex_mega.control.stages import StageConfig
from dataflex_mega.control.weight_checks import CheckedWeighter
from dataflex_mega.control.weights import build_weight_fn
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.each_row_once import without_repeats
from dataflex_mega.data.limits import ProportionLimits
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError
from dataflex_mega.rng_streams import RngStream, generator
from dataflex_mega.types import SamplingPlan, StepStats, TrainState, UpdateContext, WeightFn

MAX_PREFETCH_STEPS = 64  # how far ahead batches are prepared
MAX_PLAN_STEPS = 4096  # a plan is continued as a new one after so many steps, which bounds any replay of it
OWN_STATE = {"previous_selection", "exhausted_domains", "candidates", "stages"}  # beside the states of algorithms


@dataclass(frozen=True)
class RoleSet:
    """The active algorithms, in any combination; None for a role without one."""

    selector: Selector | None = None
    mixer: Mixer | None = None
    reorder: Reorder | None = None
    weighter: Weighter | None = None


@dataclass
class DataController:
    """One instance per run; every rank computes the same."""

    roles: RoleSet
    domains: DomainInfo
    stages: StageConfig
    sampler: Sampler
    collectives: Collectives
    signals: SignalSource
    total_steps: int
    seed: int
    limits: ProportionLimits | None = None  # bounds on the mixer's proportions
    candidates: CandidateRotation | None = None  # None: a selection scores the whole pool
    passes: OrderedPasses | None = None  # of a reorder
    learning_rate: Any = None  # () -> the engine's learning rate for the step to come
    loss_cache: LossCache = field(init=False)
    selection: SelectionRunner = field(init=False)
    weighter: CheckedWeighter | None = field(init=False)
    ordered: OrderedPlanner | None = field(init=False)
    # The latest decisions of the roles.
    selected_ids: Tensor | None = field(default=None, init=False)  # [m]; None: the whole pool
    proportions: tuple[float, ...] | None = field(default=None, init=False)  # the mixer's, None before its first update
    domain_loss_weights: tuple[float, ...] | None = field(default=None, init=False)
    _exhausted: frozenset[int] = field(default=frozenset(), init=False)  # domains that were drawn max_epochs times

    def __post_init__(self) -> None:
        domains, sampler, seed = self.domains, self.sampler, self.seed
        self.loss_cache = LossCache(self.signals, self.collectives, sum(domains.num_samples))
        self.selection = SelectionRunner(
            domains, sampler, self.collectives, self.signals, self.loss_cache, seed, self.candidates
        )
        self.ordered = None
        if self.passes is not None:
            self.ordered = OrderedPlanner(self.passes, self.stages, domains, sampler, self.loss_cache, seed)
        for algorithm in self._algorithms().values():
            contracts.setup(algorithm, domains)
        self.weighter = None if self.roles.weighter is None else CheckedWeighter(self.roles.weighter, self.collectives)

    def _algorithms(self) -> dict[str, Any]:
        by_role = {role: getattr(self.roles, role) for role in ("selector", "mixer", "reorder", "weighter")}
        by_role["reorder_scores"] = self.stages.source.selector
        return {role: algorithm for role, algorithm in by_role.items() if algorithm is not None}

    # -- when ----------------------------------------------------------------------------------------------------

    def needs_new_plan(self, state: TrainState) -> bool:
        """Whether `next_plan` must be called before the next step."""
        if self._updates_at(state.step) or not self.sampler.covers(state.plan, state.step):
            return True
        return bool(self._newly_exhausted(state)) or state.step - state.plan.start_step >= MAX_PLAN_STEPS

    def next_update_step(self, step: int, last: int) -> int:
        """The next step, at most `last`, at which a role makes another plan: what this one would draw there and later is
        not worth preparing. Looks MAX_PREFETCH_STEPS steps ahead."""
        last = min(last, step + MAX_PREFETCH_STEPS)
        return next((later for later in range(step + 1, last) if self._updates_at(later)), last)

    def _updates_at(self, step: int) -> bool:
        """Whether a role makes a new plan after `step` steps."""
        return bool(self._due_roles(step)) or self._restarts_warmup(step)

    def _due_roles(self, step: int) -> set[str]:
        """Selector, mixer, reorder: those that update after `step` steps."""
        roles = [role for role in ("selector", "mixer", "reorder") if getattr(self.roles, role) is not None]
        return {role for role in roles if self.stages.schedules[role].is_update(step)}

    def _restarts_warmup(self, step: int) -> bool:
        """Whether a selection's schedule begins another cycle after `step` steps."""
        if self.roles.selector is None or step == 0:
            return False
        schedule = self.stages.schedules["selector"]
        return schedule.repeat_cycles and schedule.starts_warmup(step)

    def _next_due_step(self, step: int) -> int:
        """The next step at which a role updates, at most MAX_PLAN_STEPS away and within the run."""
        last = min(step + MAX_PLAN_STEPS, max(self.total_steps, step + 1))
        return next((later for later in range(step + 1, last) if self._due_roles(later)), last)

    def _is_active(self, role: str, step: int) -> bool:
        """Whether a role has begun to act by `step`."""
        return getattr(self.roles, role) is not None and not self.stages.schedules[role].in_warmup(step)

    def _context(self, role: str, step: int) -> UpdateContext:
        schedule: UpdateSchedule = self.stages.schedules[role]
        return UpdateContext(
            step,
            self.total_steps,
            schedule.update_index(step),
            self.seed,
            schedule.total_updates(self.total_steps),
            0.0 if self.learning_rate is None else self.learning_rate(),
        )

    # -- limits --------------------------------------------------------------------------------------------------

    def _newly_exhausted(self, state: TrainState) -> frozenset[int]:
        """Domains that the coming step would draw more often than max_epochs allows."""
        if self.limits is None or not self.limits.has_epoch_limit:
            return frozenset()
        cursors = self.sampler.plan_from(state.plan, state.step).cursors
        return self.limits.exhausted(cursors, self.sampler.counts_at(state.plan, state.step).tolist())

    def _apply_limits(self, proportions: tuple[float, ...], step: int) -> tuple[float, ...]:
        return proportions if self.limits is None else self.limits.apply(proportions, self._exhausted, step)

    # -- plans ---------------------------------------------------------------------------------------------------

    def initial_plan(self) -> SamplingPlan:
        """The plan before any step: the whole pool in its initial proportions."""
        phase = "warmup" if self.stages.schedules["selector"].in_warmup(0) else "train"
        proportions = self._apply_limits(self.domains.initial_proportions, 0)
        return self.sampler.next_plan(None, 0, proportions, phase=phase)

    def next_plan(self, state: TrainState) -> SamplingPlan:
        """Mix, score and select; the same plan on all ranks, or TrainingFault."""
        plan = self._build_plan(state)
        if self.limits is not None and self.limits.each_row_once:
            plan = without_repeats(self.sampler, plan, self.domains.initial_proportions, self.limits.max_samples)
            self.collectives.assert_same(plan.digest(), f"the plan of step {state.step}")
            return plan
        while exhausted := self._newly_exhausted(TrainState(state.step, plan)) - self._exhausted:
            # Their proportions are redistributed, which may exhaust other domains.
            self._exhausted |= exhausted
            proportions = self._apply_limits(plan.proportions, state.step)
            plan = self.sampler.next_plan(
                state.plan, state.step, proportions, domain_loss_weights=plan.domain_loss_weights, phase=plan.phase
            )
        self.collectives.assert_same(plan.digest(), f"the plan of step {state.step}")
        return plan

    def _build_plan(self, state: TrainState) -> SamplingPlan:
        step, old = state.step, state.plan
        if self._restarts_warmup(step):
            return self._warmup_plan(step, old)
        due = self._due_roles(step)
        if self.ordered is not None:
            self.ordered.settle_unused(old, step)
        if "mixer" in due:
            self._run_mixer(step)
        if "selector" in due:
            self._run_selector(step, old)
        if self.ordered is not None and self._is_active("reorder", step):
            context, end = self._context("reorder", step), self._next_due_step(step)
            proportions = self._current_proportions()
            return self.ordered.plan(context, old, due, end, proportions, self.domain_loss_weights)
        return self._unordered_plan(step, old, due)

    def _warmup_plan(self, step: int, old: SamplingPlan) -> SamplingPlan:
        """The whole pool again. Without a mixer the old proportions are those of the selection, not of the pool."""
        self.selected_ids = None
        proportions = self.domains.initial_proportions if self.roles.mixer is None else old.proportions
        return self.sampler.next_plan(old, step, proportions, phase="warmup")

    def _run_mixer(self, step: int) -> None:
        mixer = self.roles.mixer
        assert mixer is not None
        self.signals.before_update(mixer, step)
        rng = generator(self.seed, step, RngStream.MIXER)
        proportions = contracts.proportions(mixer, self._context("mixer", step), rng, len(self.domains))
        self.proportions = self._apply_limits(proportions, step)
        self.domain_loss_weights = contracts.loss_weights(mixer, self.proportions)

    def _run_selector(self, step: int, old: SamplingPlan) -> None:
        """Choose the samples of the next window (draw), or filter the pool."""
        selector = self.roles.selector
        assert selector is not None
        context, stages = self._context("selector", step), self.stages
        self.signals.before_update(selector, step)
        if stages.mode == "draw":
            num_steps = stages.schedules["selector"].update_every
            self.selected_ids = self.selection.draw(selector, context, old, self._current_proportions(), num_steps)
        else:
            max_age = stages.max_score_age.get("selector", 0)
            self.selected_ids = self.selection.filter(selector, context, stages.keep_ratio, max_age)
        if self.ordered is not None:
            self.ordered.restrict_to(self.selected_ids)

    def _current_proportions(self) -> tuple[float, ...] | None:
        """The proportions in force, None without a mixer."""
        return None if self.roles.mixer is None else self.proportions or self.domains.initial_proportions

    def _unordered_plan(self, step: int, old: SamplingPlan, due: set[str]) -> SamplingPlan:
        proportions, loss_weights = self._current_proportions(), self.domain_loss_weights
        if self.selected_ids is None:
            if not due:
                return self.sampler.plan_from(old, step)
            proportions = proportions or self.domains.initial_proportions
            return self.sampler.next_plan(old, step, proportions, domain_loss_weights=loss_weights)
        # With one schedule a selection is drawn for the new proportions, so it has every domain that its window draws.
        covers_domains = self.stages.is_shared and {"selector", "mixer"} <= due
        if proportions is not None and not covers_domains:
            proportions = drop_empty_domains(proportions, count_domains(self.selected_ids, self.domains).tolist())
        if "selector" in due:
            return self.sampler.next_plan(
                old, step, proportions, selected_ids=self.selected_ids, domain_loss_weights=loss_weights
            )
        if proportions is None or "mixer" not in due:
            return self.sampler.plan_from(old, step)
        return self.sampler.with_proportions(old, step, proportions, loss_weights)

    # -- steps ---------------------------------------------------------------------------------------------------

    def weight_fn(self, state: TrainState) -> WeightFn | None:
        """The function that weighs the samples of the next step, or None when all weigh the same."""
        weighter = self.weighter if self._is_active("weighter", state.step) else None
        if weighter is not None:
            self.signals.before_step(
                weighter.weighter, state.step, lambda: self.sampler.global_batch(state.plan, state.step)
            )
        return build_weight_fn(weighter, self.roles.mixer, state, self.total_steps, self.collectives)

    def observe(self, stats: StepStats, state: TrainState) -> None:
        """After step number state.step: check the weights that it was done with, hand its reduced sums to the mixer."""
        if self.weighter is not None and self._is_active("weighter", state.step - 1):
            self.weighter.end_step(state.step - 1, last=state.step == self.total_steps)
        if self.roles.mixer is not None:
            contracts.observe(self.roles.mixer, stats, state.plan.proportions, state.step)

    def check_weights(self, state: TrainState) -> None:
        """Raises TrainingFault when the weights of the step under way are the reason why it is not finite."""
        if self.weighter is not None:
            self.weighter.check_values(state.step)

    def plan_report(self, state: TrainState) -> PlanReport:
        """What the roles did for the plan that was made after `state.step` steps."""
        mixer, selector = self.roles.mixer, self.roles.selector
        selection = self.selection.last_record
        order = None if self.ordered is None else self.ordered.last_record
        names = [] if selector is None else self.signals.signal_names(selector)
        return PlanReport(
            mixer=contracts.report(mixer) if mixer is not None and state.plan.phase == "train" else {},
            selection=selection if selection is not None and selection.step == state.step else None,
            signal_name=names[0] if names else "score",
            order=order if order is not None and order.step == state.step else None,
            loss_cache=LossCacheView(self.loss_cache.losses, self.loss_cache.measured_at_step),
        )

    # -- restart -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The states of the algorithms by role, and the controller's own; tensors may be anywhere in it."""
        state: dict[str, Any] = {role: contracts.state_dict(one) for role, one in self._algorithms().items()}
        if self.selection.previous_ids is not None:
            state["previous_selection"] = self.selection.previous_ids
        if self.candidates is not None and (scores := self.candidates.state_dict()):
            state["candidates"] = scores
        if self._exhausted:
            state["exhausted_domains"] = sorted(self._exhausted)
        stages: dict[str, Any] = {
            "proportions": self.proportions,
            "domain_loss_weights": self.domain_loss_weights,
            "selected_ids": self.selected_ids,
        }
        if self.passes is not None:
            stages["passes"] = self.passes.state_dict()
        if any(self.stages.max_score_age.values()):
            stages["loss_cache"] = self.loss_cache.state_dict()
        return {**state, "stages": stages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises CheckpointError when another set of roles was on."""
        algorithms = self._algorithms()
        saved_roles = set(state) - OWN_STATE
        if saved_roles != set(algorithms):
            found = f"{sorted(saved_roles)}, this run needs {sorted(algorithms)}"
            raise CheckpointError(f"the checkpoint has state of {found}")
        for role, algorithm in algorithms.items():
            contracts.load_state_dict(algorithm, state[role])
        if self.candidates is not None:
            self.candidates.load_state_dict(state.get("candidates", {}))
        self.selection.previous_ids = state.get("previous_selection")
        self._exhausted = frozenset(state.get("exhausted_domains", ()))
        stages = state["stages"]
        self.proportions, self.domain_loss_weights = (
            None if stages.get(name) is None else tuple(stages[name]) for name in ("proportions", "domain_loss_weights")
        )
        self.selected_ids = stages.get("selected_ids")
        if self.passes is not None and "passes" in stages:
            self.passes.load_state_dict(stages["passes"])
        if "loss_cache" in stages:
            self.loss_cache.load_state_dict(stages["loss_cache"])
