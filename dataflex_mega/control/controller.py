"""Decides when to re-plan, hands algorithms signals that are already reduced, and checks that all ranks agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Mixer, Reorder, Selector, Weighter
from dataflex_mega.control.domain_weights import (
    PerStepDomainFactors,
    domain_loss_factors,
    scale_keeping_sum,
    uniform_weights,
)
from dataflex_mega.control.plan_report import OrderRecord, PlanReport, SelectionRecord
from dataflex_mega.control.schedule import UpdateSchedule
from dataflex_mega.control.signal_source import SignalSource
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.limits import ProportionLimits
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError, TrainingFault
from dataflex_mega.rng_streams import RngStream
from dataflex_mega.types import (
    EmbeddingSpec,
    NeedsBatchGradients,
    NeedsGradients,
    NeedsHidden,
    SampleStats,
    SamplingPlan,
    StepStats,
    StepWeighing,
    TokenChoice,
    TokenWeightFn,
    TrainState,
    UpdateContext,
    WeightFn,
)

MAX_PREFETCH_STEPS = 64  # how far ahead batches are prepared
MAX_PLAN_STEPS = 4096  # a plan is continued as a new one after so many steps, which bounds any replay of it


@dataclass(frozen=True)
class RoleSet:
    """The algorithms that are on. Any combination."""

    selector: Selector | None = None
    mixer: Mixer | None = None
    reorder: Reorder | None = None  # needs a staged.PipelineController
    weighter: Weighter | None = None


@dataclass
class DataController:
    """One instance per run; every rank computes the same."""

    roles: RoleSet
    domains: DomainInfo
    update_schedule: UpdateSchedule
    sampler: Sampler
    collectives: Collectives
    signal_source: SignalSource
    global_batch_size: int
    total_steps: int
    seed: int
    limits: ProportionLimits | None = None  # bounds on the mixer's proportions
    target_mean: Callable[[EmbeddingSpec, int], Tensor] | None = (
        None  # see signals.sample_embeddings.MeanTargetEmbedding
    )
    candidates: CandidateRotation | None = None  # None: a selection scores the whole pool
    domain_gram: Callable[[int, bool, int], Tensor] | None = None  # see signals.gradient_gram.DomainGradientGram
    batch_gradients: Callable[[np.ndarray, int], tuple[Tensor, Tensor]] | None = None  # see providers.batch_gradients
    learning_rate: Callable[[], float] | None = None  # the engine's learning rate for the step to come
    last_selection_record: SelectionRecord | None = field(default=None, init=False)
    last_order_record: OrderRecord | None = field(default=None, init=False)
    _previous_selected_ids: Tensor | None = field(default=None, init=False)
    _exhausted: frozenset[int] = field(default=frozenset(), init=False)  # domains that were drawn max_epochs times

    def __post_init__(self) -> None:
        for algorithm in self._algorithms().values():
            algorithm.setup(self.domains)

    def _algorithms(self) -> dict[str, Any]:
        by_role = {role: getattr(self.roles, role) for role in ("selector", "mixer", "reorder", "weighter")}
        return {role: algorithm for role, algorithm in by_role.items() if algorithm is not None}

    # -- plans ---------------------------------------------------------------------------------------------------

    def initial_plan(self) -> SamplingPlan:
        """The plan before any step: the whole pool in its initial proportions."""
        phase = "warmup" if self.update_schedule.in_warmup(0) else "train"
        proportions = self._apply_limits(self.domains.initial_proportions, 0)
        return self.sampler.next_plan(None, 0, proportions, phase=phase)

    def needs_new_plan(self, state: TrainState) -> bool:
        """Whether `next_plan` must be called before the next step."""
        if self._updates_at(state.step) or self._newly_exhausted(state):
            return True
        return state.step - state.plan.start_step >= MAX_PLAN_STEPS

    def next_update_step(self, step: int, last: int) -> int:
        """The next step, at most `last`, at which a role makes another plan: what this one would draw there and later is
        not worth preparing. Looks MAX_PREFETCH_STEPS steps ahead."""
        last = min(last, step + MAX_PREFETCH_STEPS)
        return next((later for later in range(step + 1, last) if self._updates_at(later)), last)

    def _updates_at(self, step: int) -> bool:
        """Whether a role makes a new plan after `step` steps."""
        replans = self.roles.selector is not None or self.roles.mixer is not None
        return replans and (self.update_schedule.is_update(step) or self._restarts_warmup(step))

    def _restarts_warmup(self, step: int) -> bool:
        return self.roles.selector is not None and step > 0 and self.update_schedule.starts_warmup(step)

    def _newly_exhausted(self, state: TrainState) -> frozenset[int]:
        """Domains that the coming step would draw more often than max_epochs allows."""
        if self.limits is None or not self.limits.has_epoch_limit:
            return frozenset()
        drawn = self.sampler.plan_from(state.plan, state.step).cursors
        return self.limits.exhausted(drawn, self.sampler.counts_at(state.plan, state.step).tolist())

    def _apply_limits(self, proportions: tuple[float, ...], step: int) -> tuple[float, ...]:
        return proportions if self.limits is None else self.limits.apply(proportions, self._exhausted, step)

    def next_plan(self, state: TrainState) -> SamplingPlan:
        """Mix, score and select; the same plan on all ranks, or TrainingFault."""
        plan = self._build_plan(state)
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
            # Without a mixer the old proportions are those of the selection, not of the pool.
            proportions = self.domains.initial_proportions if self.roles.mixer is None else old.proportions
            return self.sampler.next_plan(old, step, proportions, phase="warmup")
        if not self.update_schedule.is_update(step):
            return self.sampler.plan_from(old, step)
        context = self._update_context(self.update_schedule, step)
        proportions, loss_weights = None, None
        if self.roles.mixer is not None:
            proportions, loss_weights = self._query_mixer(self.roles.mixer, context)
        if self.roles.selector is None:
            return self.sampler.next_plan(old, step, proportions, domain_loss_weights=loss_weights)
        selected_ids = self._select(self.roles.selector, context, old, proportions)
        return self.sampler.next_plan(
            old, step, proportions, selected_ids=selected_ids, domain_loss_weights=loss_weights
        )

    def _update_context(self, schedule: UpdateSchedule, step: int) -> UpdateContext:
        return UpdateContext(
            step,
            self.total_steps,
            schedule.update_index(step),
            self.seed,
            schedule.total_updates(self.total_steps),
            0.0 if self.learning_rate is None else self.learning_rate(),
        )

    def _query_mixer(self, mixer: Mixer, context: UpdateContext) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """([k] proportions within the limits, the [k] domain weights of the loss or None) from this update on."""
        if isinstance(mixer, NeedsGradients):
            assert self.domain_gram is not None, "set when the run was built"
            mixer.learn(self.domain_gram(mixer.probe_samples, mixer.against == "eval", context.step))
        proportions = tuple(mixer.proportions(context, self._rng(context.step, RngStream.MIXER)).double().tolist())
        weights = mixer.loss_weights()
        return (
            self._apply_limits(proportions, context.step),
            None if weights is None else tuple(weights.double().tolist()),
        )

    def _rng(self, step: int, stream: int) -> torch.Generator:
        """A generator that depends on (seed, step, stream) alone."""
        words = np.random.SeedSequence([self.seed, step, stream]).generate_state(2, np.uint64)
        return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))

    def _select(
        self, selector: Selector, context: UpdateContext, old: SamplingPlan, proportions: tuple[float, ...] | None
    ) -> Tensor:
        """[m] ascending ids of the coming window. `proportions`: the mixer's, None without one."""
        quota = None if proportions is None else self._quota(old, context.step, proportions)
        scored_ids = None if self.candidates is None else self.candidates.ids(context.update_index, quota)
        if scored_ids is not None:
            self.signal_source.restrict_to(scored_ids)
        self.signal_source.step = context.step
        local_scores = selector.score(self.signal_source.table(selector.signals)).float()
        scores = self.collectives.all_gather_uneven(local_scores, self.signal_source.rank_counts())
        candidate_ids = torch.arange(len(scores)) if scored_ids is None else torch.from_numpy(scored_ids)
        scores = selector.combine_updates(candidate_ids, scores, context)
        if self.candidates is not None and scored_ids is not None:
            candidate_ids, scores = self.candidates.merge_scores(scored_ids, scores)
        rng = self._rng(context.step, RngStream.SELECTOR)
        if quota is None:
            count = self.global_batch_size * self.update_schedule.update_every
            positions = selector.select(scores, count, context, rng)
        else:
            positions = self._select_by_domain(selector, (candidate_ids, scores), context, rng, quota)
        positions = positions.sort().values
        self._record_selection(context.step, candidate_ids[positions], scores[positions], scores)
        return candidate_ids[positions]

    def _quota(self, old: SamplingPlan, step: int, proportions: tuple[float, ...]) -> list[int]:
        """[k] how many samples of each domain the coming window draws."""
        plan = self.sampler.next_plan(old, step, proportions)
        return self.sampler.counts_before(plan, step + self.update_schedule.update_every).tolist()

    def _select_by_domain(
        self,
        selector: Selector,
        candidates: tuple[Tensor, Tensor],
        context: UpdateContext,
        rng: torch.Generator,
        quota: list[int],
    ) -> Tensor:
        """The mixer says how many of each domain, the selector which -> [m] positions in `candidates` (ids, scores).

        A domain smaller than its quota is taken whole and drawn several times.
        """
        ids, scores = candidates
        ends = torch.searchsorted(ids, torch.tensor(self.domains.num_samples).cumsum(0)).tolist()
        positions, first = [], 0
        for end, count in zip(ends, quota, strict=True):
            if count >= end - first:
                positions.append(torch.arange(first, end))
            elif count > 0:
                positions.append(selector.select(scores[first:end], count, context, rng) + first)
            first = end
        return torch.cat(positions)

    def _record_selection(self, step: int, selected_ids: Tensor, selected_scores: Tensor, scores: Tensor) -> None:
        """`scores`: those of all candidates."""
        if scores.dim() > 1:
            selected_scores, scores = selected_scores.mean(dim=1), scores.mean(dim=1)
        finite = scores[torch.isfinite(scores)].sort().values
        ranks = [round(q * (len(finite) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)] if len(finite) else []
        overlap = 0.0
        if self._previous_selected_ids is not None and len(selected_ids):
            overlap = float(torch.isin(selected_ids, self._previous_selected_ids).double().mean())
        quantiles = finite[ranks].tolist()
        self.last_selection_record = SelectionRecord(step, selected_ids, selected_scores, quantiles, overlap)
        self._previous_selected_ids = selected_ids

    # -- weights -------------------------------------------------------------------------------------------------

    def weight_fn(self, state: TrainState) -> WeightFn | None:
        """The function that weighs the samples of the next step, or None when all weigh the same."""
        weighter = self.roles.weighter if self._weighter_is_active(state.step) else None
        if isinstance(weighter, NeedsHidden) and weighter.stale(state.step):
            assert self.target_mean is not None, "checked when the run was built"
            weighter.learn(self.target_mean(weighter.hidden, weighter.target_samples), state.step)
        if isinstance(weighter, NeedsBatchGradients):
            assert self.batch_gradients is not None, "set when the run was built"
            ids = self.sampler.global_batch(state.plan, state.step)
            weighter.observe_batch(torch.from_numpy(ids), *self.batch_gradients(ids, state.step))
        weight_fn = self._base_weight_fn(weighter, state)
        if isinstance(weighter, TokenChoice):
            return TokenWeightFn(weight_fn or uniform_weights, weighter)
        return weight_fn

    def _weighter_is_active(self, step: int) -> bool:
        return not self.update_schedule.in_warmup(step)

    def _base_weight_fn(self, weighter: Weighter | None, state: TrainState) -> WeightFn | None:
        """The weights of whole samples, from the mixer's domain weights and the weighter."""
        mixer = self.roles.mixer
        if isinstance(mixer, StepWeighing) and state.plan.domain_loss_weights is not None:
            per_step_factors = PerStepDomainFactors(
                mixer.domain_weights(), torch.tensor(state.plan.proportions).double(), mixer.loss_norm
            )
            return per_step_factors if weighter is None else self._combined_weight_fn(weighter, per_step_factors, state)
        domain_factors = domain_loss_factors(state.plan)
        if weighter is None and domain_factors is None:
            return None
        return self._combined_weight_fn(weighter, domain_factors, state)

    def _combined_weight_fn(
        self, weighter: Weighter | None, domain_factors: Tensor | WeightFn | None, state: TrainState
    ) -> WeightFn:
        """The product of a weighter's weights and those of domains: [k] factors, or a function of samples."""

        def weigh(samples: SampleStats) -> Tensor:
            if isinstance(weighter, NeedsHidden):
                if samples.embeddings is None:
                    raise TrainingFault(
                        "weights by hidden states need SampleStats.embeddings, which the engine did not give"
                    )
                samples = replace(samples, embeddings=weighter.compare(samples.embeddings))
            rows = {name: self.collectives.all_gather(local) for name, local in samples.gathered_fields().items()}
            gathered = SampleStats(**rows)
            weights = torch.ones_like(gathered.loss_sum)
            if isinstance(domain_factors, Tensor):
                weights = domain_factors.to(weights)[gathered.domain_ids]
            elif domain_factors is not None:
                weights = domain_factors(replace(gathered, step_denominators=samples.step_denominators))
            if weighter is not None:
                of_weighter = weighter.weights(gathered, state.step, self.total_steps).to(weights)
                weights = of_weighter if domain_factors is None else scale_keeping_sum(of_weighter, weights)
            return self.collectives.local_rows(weights, len(samples.sample_ids))

        return weigh

    # -- after a step --------------------------------------------------------------------------------------------

    def observe(self, stats: StepStats, state: TrainState) -> None:
        """Hand the reduced sums of the step just done (number state.step) to the mixer."""
        if self.roles.mixer is not None:
            self.roles.mixer.observe(stats, state.plan.proportions, state.step)

    def plan_report(self, state: TrainState) -> PlanReport:
        """What the roles did for the plan that was made after `state.step` steps."""
        mixer, selector = self.roles.mixer, self.roles.selector
        selection, order = self.last_selection_record, self.last_order_record
        signals = [] if selector is None else sorted(selector.signals)
        return PlanReport(
            mixer=mixer.report() if mixer is not None and state.plan.phase == "train" else {},
            selection=selection if selection is not None and selection.step == state.step else None,
            signal_name=signals[0] if signals else "score",
            order=order if order is not None and order.step == state.step else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """The states of the algorithms by role, and the controller's own; tensors may be anywhere in it."""
        state: dict[str, Any] = {role: algorithm.state_dict() for role, algorithm in self._algorithms().items()}
        if self._previous_selected_ids is not None:
            state["previous_selection"] = self._previous_selected_ids
        if self.candidates is not None and (scores := self.candidates.state_dict()):
            state["candidates"] = scores
        if self._exhausted:
            state["exhausted_domains"] = sorted(self._exhausted)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises CheckpointError when another set of roles was on."""
        algorithms = self._algorithms()
        saved_roles = set(state) - {"previous_selection", "exhausted_domains", "candidates"}
        if saved_roles != set(algorithms):
            found = f"{sorted(saved_roles)}, this run needs {sorted(algorithms)}"
            raise CheckpointError(f"the checkpoint has state of {found}")
        for role, algorithm in algorithms.items():
            algorithm.load_state_dict(state[role])
        if self.candidates is not None:
            self.candidates.load_state_dict(state.get("candidates", {}))
        self._previous_selected_ids = state.get("previous_selection")
        self._exhausted = frozenset(state.get("exhausted_domains", ()))
