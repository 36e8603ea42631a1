"""The fourth stage of a run: how many steps it has, which samples a step draws, when roles act."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.config.sample_order import keeps_order
from dataflex_mega.control.schedule import RunLength, UpdateSchedule, total_steps
from dataflex_mega.control.stages import ScoreSource
from dataflex_mega.data.candidates import CandidateRotation
from dataflex_mega.data.limits import ProportionLimits, make_limits
from dataflex_mega.data.loader import BatchPartition
from dataflex_mega.data.natural_order import NaturalOrder
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import ConfigError
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
    epoch_samples: int  # draws that are one epoch

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
        interleaving = session.config.interleaving
        epoch_samples = len(pool) if interleaving is None else interleaving.epoch_samples(pool.sizes)
        length = RunLength(keys.train_step, training.max_steps, training.num_train_epochs, epoch_samples, batch)
        mixes = mixes and roles.pipeline is None and not (interleaving is not None and interleaving.sets_length)
        max_steps = total_steps(length, schedule, keys.update_step > 0 if staged else selects, mixes)
        domains = DomainInfo(pool.names, pool.sizes, session.config.initial_proportions(pool.sizes, pool.names))
        if interleaving is not None and interleaving.draws_each_row_once:
            limits, max_steps = _each_row_once(domains, length, batch)
        else:
            limits = _limits(session, domains, max_steps * batch)
        return cls(
            partition,
            schedule,
            max_steps,
            make_sampler(session, pool.sizes, batch),
            domains,
            limits,
            score_source(session, roles, pool),
            make_candidates(session, roles, pool, batch),
            epoch_samples,
        )


def make_sampler(session: Session, sizes: Sequence[int], batch_size: int) -> Sampler:
    """What says which samples a step draws: in a random order, or as the rows come."""
    cls = NaturalOrder if keeps_order(session.config.llamafactory) else Sampler
    return cls(sizes, batch_size, session.data_seed)


def _limits(session: Session, domains: DomainInfo, num_draws: int) -> ProportionLimits | None:
    """Floors, caps and epochs of the domains, or None without them. Raises ConfigError for ones that cannot hold."""
    keys = session.config.dataflex
    bounds = {"min_proportion": keys.min_proportion, "max_proportion": keys.max_proportion}
    limits = make_limits(domains.names, domains.num_samples, bounds, keys.max_epochs)
    if limits is not None:
        limits.check_run(num_draws)
    return limits


def _each_row_once(domains: DomainInfo, length: RunLength, batch: int) -> tuple[ProportionLimits, int]:
    """(limits under which no row is drawn more often than the run has epochs, its steps). The last rows that fill no batch
    are left out."""
    sizes, steps = domains.num_samples, length.train_step or max(length.max_steps, 0)
    epochs = math.ceil(steps * batch / sum(sizes)) if steps else length.epochs
    rows = tuple(float(math.floor(epochs * size)) for size in sizes)
    steps = steps or int(sum(rows)) // batch
    if steps < 1:
        raise ConfigError(f"mix_strategy: interleave_once: {int(sum(rows))} rows do not fill one batch of {batch}")
    ones, zeros = (1.0,) * len(sizes), (0.0,) * len(sizes)
    return ProportionLimits(domains.names, zeros, ones, rows, each_row_once=True), steps
