"""A run from its configuration, in frozen stages: the order is that in which mistakes are cheapest to find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from dataflex_mega.algorithms.base import Algorithm
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.distributed.parallel_info import DEFAULT_TIMEOUT, set_timeouts, timeout_of
from dataflex_mega.distributed.peers import POSITION, NamedPeers
from dataflex_mega.engines.base import Engine
from dataflex_mega.errors import ConfigError
from dataflex_mega.locks import FolderLock, Held
from dataflex_mega.preemption import StopRequest, stop_requests, when_stopped
from dataflex_mega.providers.registry import requests_at
from dataflex_mega.run import output_folder, outputs, preflight, reference
from dataflex_mega.run.assemble import assemble
from dataflex_mega.run.corpus_check import start_check
from dataflex_mega.run.data import RunData
from dataflex_mega.run.effects import notes_on_effects
from dataflex_mega.run.media import check_signals
from dataflex_mega.run.outputs import OutputOptions
from dataflex_mega.run.pair_references import PairReferences
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
    stop_request: StopRequest
    held: ExitStack  # gives up what the run alone may use, the lock of output_dir
    pair_references: PairReferences | None = None  # of a run with pairs, for which the model must be built


def prepare(
    config: RunConfig,
    instances: Mapping[str, Algorithm] | None = None,
    stop_request: StopRequest | None = None,
) -> PreparedRun:
    """Check a configuration and read its data. `instances`: role -> an algorithm to use as it is.

    Raises UserError, also when another process is training in output_dir.
    """
    roles = RunRoles.from_config(config, instances)
    output_folder.refuse_other_runs(config.llamafactory)
    session = Session.start(config)
    with ExitStack() as stack:
        data = RunData.load(session, roles)
        schedule = RunSchedule.plan(session, roles, data)
        session.report(*(f"note: {note}" for note in notes_on_effects(config, roles, data, schedule)))
        preflight.check(session, data, schedule)
        stack.enter_context(lock_output_dir(session))
        cache = reference.find_cache(session, roles, data.pool)
        pairs = PairReferences.find(session, data)
        resume = ResumePoint.find(session, roles, data, schedule, cache if pairs is None else pairs.of_pool)
        if cache is not None:
            reference.ensure_complete(session, data, cache)
        request, with_references = stop_request or StopRequest(), data.with_references(cache)
        return PreparedRun(session, roles, with_references, schedule, resume, request, stack.pop_all(), pairs)


@contextmanager
def lock_output_dir(session: Session) -> Iterator[None]:
    """Hold the lock of output_dir, by the main process. Raises UserError on all processes when another run holds it."""
    lock = FolderLock(session.output_dir)
    holder = run_on_main(session.collectives, lock.try_acquire)
    if holder is not None:
        raise Held(f"output_dir: {session.output_dir} is in use by {holder}; wait for its end or name another folder")
    try:
        yield
    finally:
        lock.release()


def build_engine(run: PreparedRun) -> Engine:
    """Build the model with what the algorithms ask of the training forward pass."""
    options: dict[str, object] = {"stop_requested": run.stop_request.requested}
    for _, algorithm in run.roles.active_algorithms():
        for request, entry in requests_at(algorithm, "forward"):
            for name, value in entry.provider.step_options(request).items():
                if options.setdefault(name, value) != value:
                    raise ConfigError(
                        f"two algorithms want another {name} of the training forward pass; keep one of them"
                    )
    tokenizer, num_domains = run.session.tokenizer, len(run.data.pool.sizes)
    engine = run.session.engine_builder.build_engine(tokenizer, num_domains, run.schedule.max_steps, options)
    check_signals(run.roles, engine)
    set_timeouts(
        timeout_of(run.session.config.llamafactory) or DEFAULT_TIMEOUT
    )  # of the groups that the model has made
    return engine


def build(
    config: RunConfig,
    instances: Mapping[str, Algorithm] | None = None,
    options: OutputOptions | None = None,
    stop_request: StopRequest | None = None,
) -> tuple[PreparedRun, Trainer]:
    """A configuration -> (its stages, the loop with all its parts). Raises UserError."""
    run = prepare(config, instances, stop_request)
    with ExitStack() as stack:
        stack.enter_context(run.held)
        engine = build_engine(run)
        if run.pair_references is not None:
            run = replace(run, data=run.pair_references.attach(run.session, run.data, engine))
        trainer = assemble(run.session, run.roles, run.data, run.schedule, run.resume, engine, options)
        trainer.position = POSITION
        trainer.stop = when_stopped(run.stop_request, run.session.collectives.all_gather_objects)
        stack.pop_all()
    return run, trainer


def run_training(
    config: RunConfig,
    instances: Mapping[str, Algorithm] | None = None,
    options: OutputOptions | None = None,
) -> tuple[PreparedRun, Trainer, TrainState]:
    """Build, train, and write what the run gives -> its stages, its loop, and the state after the last step.

    Raises errors.Stopped after a signal that asks the run to leave, where its checkpoint stays.
    """
    options = options or OutputOptions()
    with stop_requests(config.dataflex.save_on_signal and options.logs) as stop_request, NamedPeers():
        run, trainer = build(config, instances, options, stop_request)
        with run.held:
            stop_request.training = True
            check = start_check(run.session)
            if check is not None:
                trainer.check_data = check.ask
            try:
                if check is not None and config.dataflex.verify == "full":
                    check.ask(wait=True)
                state = trainer.fit(run.resume.path)
            finally:
                trainer.loader.close()
            POSITION.enter("export")
            outputs.write_results(run.session, run.roles, run.data, run.schedule, trainer, options)
            run.resume.finish()
    return run, trainer, state
