"""Plans whose samples stand in an order of their scores, up to the next update of any role.

A plan that ends early returns its samples, so none is skipped, and none is trained twice in a pass (see control.passes).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.control import contracts
from dataflex_mega.control.loss_cache import LossCache
from dataflex_mega.control.passes import OrderedPasses
from dataflex_mega.control.plan_report import OrderRecord
from dataflex_mega.control.stages import ScoreSource, StageConfig
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.rng_streams import RngStream, generator
from dataflex_mega.types import SamplingPlan, UpdateContext


@dataclass
class OrderedPlanner:
    """Makes the plans of a run with a reorder; every rank computes the same."""

    passes: OrderedPasses
    stages: StageConfig
    domains: DomainInfo
    sampler: Sampler
    loss_cache: LossCache
    seed: int
    last_record: OrderRecord | None = field(default=None, init=False)

    def settle_unused(self, old: SamplingPlan, step: int) -> None:
        """Tell the passes which samples were trained outside them, and which they served that were not trained."""
        if step == old.start_step and old.ordered_ids is None:
            return
        if old.ordered_ids is not None:
            unused = old.ordered_ids[(step - old.start_step) * self.sampler.batch_size :]
            if len(unused):
                self.passes.return_unused(unused)
            return
        for earlier in range(old.start_step, step):
            self.passes.mark_served(torch.from_numpy(self.sampler.global_batch(old, earlier)))

    def restrict_to(self, selected_ids: Tensor) -> None:
        """Serve only selected samples from now on."""
        self.passes.restrict_to(selected_ids)
        if self.stages.mode == "draw":
            self.passes.restart()

    def plan(
        self,
        context: UpdateContext,
        old: SamplingPlan,
        due: Set[str],
        end: int,
        proportions: tuple[float, ...] | None,
        loss_weights: tuple[float, ...] | None,
    ) -> SamplingPlan:
        """The plan of the steps context.step .. end - 1.

        Args:
            context: of the reorder.
            due: the roles that updated at this step.
            proportions: the mixer's; None for one pass over all samples.
        """
        step, passes = context.step, self.passes
        if "reorder" in due and not self.stages.consume_once:
            passes.restart()
        if proportions is None:
            counts = [(end - step) * self.sampler.batch_size]
            num_scored = self._refresh_scores(context, due, counts)
            ordered_ids = passes.next_ids(0, counts[0])
            fractions = self._domain_fractions(ordered_ids)
            plan = self.sampler.next_plan(old, step, fractions, domain_loss_weights=loss_weights)
            plan = replace(plan, credits=(0.0,) * len(fractions), ordered_ids=ordered_ids)
        else:
            proportions = drop_empty_domains(proportions, passes.sizes())
            plan = self.sampler.next_plan(old, step, proportions, domain_loss_weights=loss_weights)
            counts = self.sampler.counts_before(plan, end).tolist()
            num_scored = self._refresh_scores(context, due, counts)
            ids_per_domain = [passes.next_ids(domain, count) for domain, count in enumerate(counts)]
            plan = replace(plan, ordered_ids=self.sampler.order_into_steps(plan, end - step, ids_per_domain))
        self.last_record = self._record(plan, end, num_scored)
        return plan

    def _domain_fractions(self, ids: Tensor) -> tuple[float, ...]:
        """[m] ids -> [k] fractions of them, which sum to 1."""
        counts = count_domains(ids, self.domains).double()
        return tuple((counts / counts.sum()).tolist())

    def _refresh_scores(self, context: UpdateContext, due: Set[str], counts: list[int]) -> int:
        """Bring the scores of the next `counts` samples of each group up to date -> how many samples were scored."""
        source, passes = self.stages.source, self.passes
        if not passes.pattern.uses_scores:
            return 0
        if source.fixed is not None:
            if passes.scores is None:
                passes.set_scores(source.fixed)
            return 0
        is_due = "selector" in due or ("reorder" in due and context.update_index % self.stages.score_every == 0)
        if passes.scores is not None and not (is_due and self.stages.rescore):
            return 0
        assert source.selector is not None
        self.loss_cache.signals.before_update(source.selector, context.step)
        ids = passes.upcoming_ids(counts)
        scored = self._subsample(ids, source, context.step)
        scores = torch.full((len(ids),), torch.nan)
        max_age = self.stages.max_score_age.get("reorder", 0)
        new_scores = self.loss_cache.score(source.selector, ids[scored], context.step, max_age)
        scores[scored] = contracts.combine_updates(source.selector, ids[scored], new_scores, context)
        passes.set_scores(scores, ids)
        return len(scored)

    def _subsample(self, ids: Tensor, source: ScoreSource, step: int) -> Tensor:
        """[m] ascending positions in `ids`, all of them or `max_samples` at random."""
        if source.max_samples is None or len(ids) <= source.max_samples:
            return torch.arange(len(ids))
        rng = generator(self.seed, step, RngStream.SCORE_SUBSET + source.seed)
        return torch.randperm(len(ids), generator=rng)[: source.max_samples].sort().values

    def _record(self, plan: SamplingPlan, end: int, num_scored: int) -> OrderRecord:
        assert plan.ordered_ids is not None
        scores = self.passes.scores if self.passes.pattern.uses_scores else None
        mean = None if scores is None else float(scores[plan.ordered_ids].double().mean())
        return OrderRecord(plan.start_step, end, num_scored, mean, list(self.passes.num_completed))


def drop_empty_domains(proportions: tuple[float, ...], counts: list[int]) -> tuple[float, ...]:
    """[k] proportions without the domains that have no sample; theirs go to the others."""
    rest = [p if count else 0.0 for p, count in zip(proportions, counts, strict=True)]
    return proportions if rest == list(proportions) or not sum(rest) else tuple(p / sum(rest) for p in rest)


def count_domains(ids: Tensor, domains: DomainInfo) -> Tensor:
    """[m] ids -> [k] int64, how many of them each domain has."""
    ends = torch.tensor(domains.num_samples).cumsum(0)
    return torch.bincount(torch.searchsorted(ends, ids, right=True), minlength=len(ends))
