"""A run from its configuration, in frozen stages: the order is that in which mistakes are cheapest to find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dataflex_mega.algorithms.base import Algorithm
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.engines.base import Engine
from dataflex_mega.errors import ConfigError
from dataflex_mega.providers.registry import requests_at
from dataflex_mega.run import outputs, preflight, reference
from dataflex_mega.run.assemble import assemble
from dataflex_mega.run.data import RunData
from dataflex_mega.run.outputs import OutputOptions
from dataflex_mega.run.resume import ResumePoint
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.session import Session
from dataflex_mega.trainer import Trainer
from dataflex_mega.types import TrainState


@dataclass(frozen=True)
class PreparedRun:
    """All stages before a model is built."""

    session: Session
    roles: RunRoles
    data: RunData
    schedule: RunSchedule
    resume: ResumePoint


def prepare(config: RunConfig, instances: Mapping[str, Algorithm] | None = None) -> PreparedRun:
    """Check a configuration and read its data. `instances`: role -> an algorithm to use as it is. Raises UserError."""
    roles = RunRoles.from_config(config, instances)
    session = Session.start(config)
    data = RunData.load(session, roles)
    schedule = RunSchedule.plan(session, roles, data)
    preflight.check(session, data, schedule)
    cache = reference.find_cache(session, roles, data.pool)
    resume = ResumePoint.find(session, roles, data, schedule, cache)
    if cache is not None:
        reference.ensure_complete(session, data, cache)
    return PreparedRun(session, roles, data.with_references(cache), schedule, resume)


def build_engine(run: PreparedRun) -> Engine:
    """Build the model with what the algorithms ask of the training forward pass."""
    options: dict[str, object] = {}
    for _, algorithm in run.roles.active_algorithms():
        for request, entry in requests_at(algorithm, "forward"):
            for name, value in entry.provider.step_options(request).items():
                if options.setdefault(name, value) != value:
                    raise ConfigError(
                        f"two algorithms want another {name} of the training forward pass; keep one of them"
                    )
    tokenizer, num_domains = run.session.tokenizer, len(run.data.pool.sizes)
    return run.session.engine_builder.build_engine(tokenizer, num_domains, run.schedule.max_steps, options)


def build(
    config: RunConfig,
    instances: Mapping[str, Algorithm] | None = None,
    options: OutputOptions | None = None,
) -> tuple[PreparedRun, Trainer]:
    """A configuration -> (its stages, the loop with all its parts). Raises UserError."""
    run = prepare(config, instances)
    return run, assemble(run.session, run.roles, run.data, run.schedule, run.resume, build_engine(run), options)


def run_training(
    config: RunConfig,
    instances: Mapping[str, Algorithm] | None = None,
    options: OutputOptions | None = None,
) -> tuple[PreparedRun, Trainer, TrainState]:
    """Build, train, and write what the run gives -> its stages, its loop, and the state after the last step."""
    run, trainer = build(config, instances, options)
    try:
        state = trainer.fit(run.resume.path)
    finally:
        trainer.loader.close()
    outputs.write_results(run.session, run.roles, run.data, run.schedule, trainer, options or OutputOptions())
    return run, trainer, state
