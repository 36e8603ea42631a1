"""The fourth stage of a run: how many steps it has, which samples a step draws, when roles act."""

from __future__ import annotations

from dataclasses import dataclass

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.control.schedule import RunLength, UpdateSchedule, total_steps
from dataflex_mega.control.stages import ScoreSource
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.limits import ProportionLimits, make_limits
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.run.data import RunData
from dataflex_mega.run.ordering import score_source
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.selection import make_candidates
from dataflex_mega.run.session import Session


@dataclass(frozen=True)
class RunSchedule:
    """Everything about steps that is known before a model is built."""

    partition: BatchPartition
    update_schedule: UpdateSchedule
    max_steps: int
    sampler: Sampler
    domains: DomainInfo
    limits: ProportionLimits | None
    score_source: ScoreSource  # what a reorder sorts by
    candidates: CandidateRotation | None  # None: a selection considers the whole pool

    @classmethod
    def plan(cls, session: Session, roles: RunRoles, data: RunData) -> RunSchedule:
        """Raises ConfigError and UserError for keys that do not fit the data."""
        training, keys = session.args.training, session.config.dataflex
        partition = BatchPartition(
            session.parallel_info.dp_rank,
            session.parallel_info.dp_size,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
        )
        batch, pool, active = partition.global_batch_size, data.pool, roles.algorithms
        selects, mixes = active.selector is not None, active.mixer is not None
        staged = roles.reorder is not None or roles.pipeline is not None
        schedule = UpdateSchedule(keys.warmup_step, keys.update_step, keys.update_times, selects and not staged)
        length = RunLength(keys.train_step, training.max_steps, training.num_train_epochs, len(pool), batch)
        max_steps = total_steps(
            length, schedule, keys.update_step > 0 if staged else selects, mixes and roles.pipeline is None
        )
        domains = DomainInfo(pool.names, pool.sizes, session.config.initial_proportions(pool.sizes, pool.names))
        return cls(
            partition,
            schedule,
            max_steps,
            Sampler(pool.sizes, batch, session.data_seed),
            domains,
            _limits(session, domains, max_steps * batch),
            score_source(session, roles, pool),
            make_candidates(session, roles, pool, batch),
        )


def _limits(session: Session, domains: DomainInfo, num_draws: int) -> ProportionLimits | None:
    """Floors, caps and epochs of the domains, or None without them. Raises ConfigError for ones that cannot hold."""
    keys = session.config.dataflex
    bounds = {"min_proportion": keys.min_proportion, "max_proportion": keys.max_proportion}
    limits = make_limits(domains.names, domains.num_samples, bounds, keys.max_epochs)
    if limits is not None:
        limits.check_run(num_draws)
    return limits
