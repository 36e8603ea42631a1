"""The fifth stage of a run: its identity, and the checkpoint from which it continues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_mega.checkpoint import Checkpointer, remove_later_than
from dataflex_mega.config.identity import identity
from dataflex_mega.data.sampler import Sampler
from dataflex_mega.errors import CheckpointError
from dataflex_mega.run import ordering
from dataflex_mega.run.data import RunData
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.session import Session
from dataflex_mega.store.reference_losses import ReferenceLossCache
from dataflex_mega.types import SamplingPlan


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins. `path` is None and `first_step` 0 for a run from the start."""

    checkpointer: Checkpointer
    path: Path | None
    first_step: int
    restate_plan: Callable[[SamplingPlan, int], SamplingPlan] | None  # of a checkpoint with another global batch size

    @classmethod
    def find(
        cls,
        session: Session,
        roles: RunRoles,
        data: RunData,
        schedule: RunSchedule,
        reference: ReferenceLossCache | None,
    ) -> ResumePoint:
        """Find the checkpoint that the configuration names, or the newest whole one in output_dir.

        Raises CheckpointError for one that is damaged or belongs to another run, and when there is one that
        `resume_from_checkpoint: false` forbids.
        """
        requested = session.config.llamafactory.get("resume_from_checkpoint")
        checkpointer = _checkpointer(session, roles, data, schedule, reference)
        _prepare_folder(session, overwrite=not requested)
        if isinstance(requested, str) and requested:
            path: Path | None = Path(requested)
            if not Path(requested).is_dir():
                raise CheckpointError(f"resume_from_checkpoint: {requested} is not a folder")
        else:
            path, notes = checkpointer.latest()
            session.report(*notes)
        if path is None:
            return cls(checkpointer, None, 0, None)
        if requested is False:
            raise CheckpointError(
                f"resume_from_checkpoint: false, but there is {path}; use another output_dir or overwrite_output_dir: true"
            )
        return cls._from_checkpoint(session, data, schedule, checkpointer, path)

    @classmethod
    def _from_checkpoint(
        cls, session: Session, data: RunData, schedule: RunSchedule, checkpointer: Checkpointer, path: Path
    ) -> ResumePoint:
        saved, restate = checkpointer.read(path), None
        batch = saved["identity"]["global_batch_size"]
        if batch != schedule.partition.global_batch_size:  # the steps of its plan were counted in batches of that size
            restate = Sampler(data.pool.sizes, batch, session.data_seed).plan_from
        first_step = saved["step"]
        if session.parallel_info.is_main and path.resolve().parent == session.output_dir.resolve():
            remove_later_than(session.output_dir, first_step)
        session.report(f"continuing from {path} at step {first_step} of {schedule.max_steps}")
        return cls(checkpointer, path, first_step, restate)


def _checkpointer(
    session: Session, roles: RunRoles, data: RunData, schedule: RunSchedule, reference: ReferenceLossCache | None
) -> Checkpointer:
    config = session.config
    run_identity: dict[str, Any] = identity(
        config, schedule.partition.global_batch_size, data.pool.fingerprint(), dict(roles.specs)
    )
    run_identity.update(ordering.fingerprint(schedule.score_source))
    if reference is not None:
        run_identity["reference"] = reference.identity["model"]
    if config.dataflex.init_mixture_proportions_file is not None:
        run_identity["init_mixture_proportions"] = list(schedule.domains.initial_proportions)
    limit, ignored = session.args.training.save_total_limit, tuple(config.dataflex.resume_ignore)
    return Checkpointer(session.output_dir, session.collectives, run_identity, limit, ignored)


def _prepare_folder(session: Session, overwrite: bool) -> None:
    if session.parallel_info.is_main:
        session.output_dir.mkdir(parents=True, exist_ok=True)
        if session.config.llamafactory.get("overwrite_output_dir") and overwrite:
            remove_later_than(session.output_dir, -1)
    session.collectives.barrier()
