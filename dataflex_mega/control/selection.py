"""One selection: score the candidates, combine, choose, and record what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataflex_mega.algorithms.base import DomainInfo, Selector
from dataflex_mega.control import contracts
from dataflex_mega.control.loss_cache import LossCache
from dataflex_mega.control.plan_report import SelectionRecord
from dataflex_mega.control.signal_source import SignalSource
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.rng_streams import RngStream, generator
from dataflex_mega.types import SamplingPlan, UpdateContext


@dataclass
class SelectionRunner:
    """Runs the selector of a run; every rank computes the same."""

    domains: DomainInfo
    sampler: Sampler
    collectives: Collectives
    signals: SignalSource
    loss_cache: LossCache
    seed: int
    candidates: CandidateRotation | None = None  # None: a selection scores the whole pool
    last_record: SelectionRecord | None = field(default=None, init=False)
    previous_ids: Tensor | None = field(default=None, init=False)

    def draw(
        self,
        selector: Selector,
        context: UpdateContext,
        old: SamplingPlan,
        proportions: tuple[float, ...] | None,
        num_steps: int,
    ) -> Tensor:
        """[m] ascending ids of the samples of the coming `num_steps` steps. `proportions`: the mixer's, None without one."""
        quota = None if proportions is None else self._quota(old, context.step, proportions, num_steps)
        scored_ids = None if self.candidates is None else self.candidates.ids(context.update_index, quota)
        table, counts = self.signals.table(selector, scored_ids, context.step)
        scores = contracts.gather_scores(selector, table, counts, self.collectives)
        candidate_ids = torch.arange(len(scores)) if scored_ids is None else torch.from_numpy(scored_ids)
        scores = contracts.combine_updates(selector, candidate_ids, scores, context)
        if self.candidates is not None and scored_ids is not None:
            candidate_ids, scores = self.candidates.merge_scores(scored_ids, scores)
        rng = generator(self.seed, context.step, RngStream.SELECTOR)
        if quota is None:
            positions = contracts.select(selector, scores, self.sampler.batch_size * num_steps, context, rng)
        else:
            positions = self._select_by_domain(selector, (candidate_ids, scores), context, rng, quota)
        positions = positions.sort().values
        self._record(context.step, candidate_ids[positions], scores[positions], scores)
        return candidate_ids[positions]

    def filter(self, selector: Selector, context: UpdateContext, keep_ratio: float, max_age: int) -> Tensor:
        """[m] ascending ids, the best `keep_ratio` of the pool. `max_age`: how many steps old a loss may be."""
        all_ids = torch.arange(sum(self.domains.num_samples))
        scores = self.loss_cache.score(selector, all_ids, context.step, max_age)
        scores = contracts.combine_updates(selector, all_ids, scores, context)
        count = max(1, int(len(scores) * keep_ratio))
        rng = generator(self.seed, context.step, RngStream.SELECTOR)
        selected_ids = contracts.select(selector, scores, count, context, rng).unique()
        self._record(context.step, selected_ids, scores[selected_ids], scores)
        return selected_ids

    def _quota(self, old: SamplingPlan, step: int, proportions: tuple[float, ...], num_steps: int) -> list[int]:
        """[k] how many samples of each domain the coming steps draw."""
        plan = self.sampler.next_plan(old, step, proportions)
        return self.sampler.counts_before(plan, step + num_steps).tolist()

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
                positions.append(contracts.select(selector, scores[first:end], count, context, rng) + first)
            first = end
        return torch.cat(positions)

    def _record(self, step: int, selected_ids: Tensor, selected_scores: Tensor, scores: Tensor) -> None:
        """`scores`: those of all candidates."""
        if scores.dim() > 1:
            selected_scores, scores = selected_scores.mean(dim=1), scores.mean(dim=1)
        finite = scores[torch.isfinite(scores)].sort().values
        ranks = [round(q * (len(finite) - 1)) for q in (0, 0.25, 0.5, 0.75, 1)] if len(finite) else []
        overlap = 0.0
        if self.previous_ids is not None and len(selected_ids):
            overlap = float(torch.isin(selected_ids, self.previous_ids).double().mean())
        self.last_record = SelectionRecord(step, selected_ids, selected_scores, finite[ranks].tolist(), overlap)
        self.previous_ids = selected_ids
