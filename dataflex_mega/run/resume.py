"""The fifth stage of a run: its identity, and the checkpoint from which it continues.

Nothing is removed here. What a new start or an older checkpoint makes void goes when the first checkpoint that replaces it
is on the disk; see ResumePoint.begin and Checkpointer.save.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dataflex_mega.checkpoint_folder as checkpoint_folder
from dataflex_mega.checkpoint import Checkpointer
from dataflex_mega.checkpoint_folder import CheckpointFolder
from dataflex_mega.checkpoint_format import Lineage, Manifest, read_state
from dataflex_mega.config.identity import UNCOMPARED, identity
from dataflex_mega.data.content import content_hashes
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.errors import CheckpointError
from dataflex_mega.run import ordering, output_folder
from dataflex_mega.run.data import RunData
from dataflex_mega.run.output_folder import FORMER, RunRecord
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule, make_sampler
from dataflex_mega.run.session import Session
from dataflex_mega.store.reference_losses import ReferenceLossCache
from dataflex_mega.types import SamplingPlan

START_OVER = "overwrite_output_dir: true begins at step 0"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins. `path` is None and `first_step` 0 for a run from the start."""

    checkpointer: Checkpointer
    path: Path | None
    first_step: int
    restate_plan: Callable[[SamplingPlan, int], SamplingPlan] | None  # of a checkpoint with another global batch size
    replaces_run: bool = False  # whether output_dir holds a run that this one begins anew

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

        Raises CheckpointError for one that is damaged or belongs to another run, when all are damaged, and when there is one
        that `resume_from_checkpoint: false` forbids.
        """
        checkpointer = _checkpointer(session, roles, data, schedule, reference)
        run_on_main(session.collectives, partial(_open_folder, session.output_dir))
        search = _Search(session, checkpointer, checkpointer.survey())
        start = search.start()
        point = cls(checkpointer, start, 0, None, search.starts_over and start is None)
        if start is not None:
            point = cls._from_checkpoint(session, data, schedule, checkpointer, start)
        search.check_collisions(point.first_step, schedule.max_steps)
        return point

    @classmethod
    def _from_checkpoint(
        cls, session: Session, data: RunData, schedule: RunSchedule, checkpointer: Checkpointer, path: Path
    ) -> ResumePoint:
        saved, restate = checkpointer.read(path), None
        batch = saved["identity"]["global_batch_size"]
        if batch != schedule.partition.global_batch_size:  # the steps of its plan were counted in batches of that size
            restate = make_sampler(session, data.pool.sizes, batch).plan_from
        first_step = saved["step"]
        session.report(f"continuing from {path} at step {first_step} of {schedule.max_steps}")
        return cls(checkpointer, path, first_step, restate)

    def begin(self) -> None:
        """The model is built and loaded: say whose output_dir it is now, and set the logs of a former run aside."""
        run_on_main(self.checkpointer.collectives, self._begin)

    def _begin(self) -> None:
        folder, run = self.checkpointer.folder, self.checkpointer.lineage.run
        if self.replaces_run:
            output_folder.set_former_logs_aside(folder)
        former = RunRecord.read(folder / FORMER)
        if former is not None and former.run == run:  # it goes on after all
            output_folder.restore_former_logs(folder)
        self.checkpointer.former_logs = folder / FORMER
        RunRecord(run, finished=False).write(folder)

    def finish(self) -> None:
        """The results are written: the former run goes, and the same command would begin anew where it overwrites."""
        self.checkpointer.finish()
        run_on_main(self.checkpointer.collectives, self._finish)

    def _finish(self) -> None:
        RunRecord(self.checkpointer.lineage.run, finished=True).write(self.checkpointer.folder)


@dataclass
class _Search:
    """Decides where a run begins. `found`: the `checkpoint-N` of output_dir."""

    session: Session
    checkpointer: Checkpointer
    found: list[CheckpointFolder]
    starts_over: bool = False

    def __post_init__(self) -> None:
        keys = self.session.config.llamafactory
        self.requested = keys.get("resume_from_checkpoint")
        self.overwrite = bool(keys.get("overwrite_output_dir"))
        self.own = [one for one in self.found if one.is_own]
        self.void = checkpoint_folder.find_superseded(self.found)

    def start(self) -> Path | None:
        """The checkpoint to begin from, or None. Sets what the checkpointer is to know of it."""
        if isinstance(self.requested, str) and self.requested:
            return self._from_named(Path(self.requested).expanduser())
        if self.overwrite:
            return self._or_anew()
        candidates = [one for one in self.own if one.path not in self.void and not one.is_model_only]
        chosen, faults = self.checkpointer.newest_whole(candidates)
        self._pass_over_models(chosen)
        if chosen is None and faults:
            raise CheckpointError(
                f"output_dir: no checkpoint in {self.session.output_dir} is whole: {'; '.join(faults)}. "
                f"{START_OVER}; another output_dir leaves them"
            )
        if chosen is None:
            if self.requested is True:
                self.session.report(f"note: resume_from_checkpoint: no checkpoint in {self.session.output_dir} yet")
            return self._anew(Lineage(_new_name()))
        if self.requested is False:
            raise CheckpointError(
                f"resume_from_checkpoint: false, but there is {chosen.path}; use another output_dir or "
                "overwrite_output_dir: true"
            )
        self._report_faults(faults, chosen)
        return self._continue(chosen)

    def _from_named(self, path: Path) -> Path:
        """What resume_from_checkpoint names, or the newest whole checkpoint of a run that began there."""
        if not path.is_dir():
            raise CheckpointError(f"resume_from_checkpoint: {path} is not a folder")
        manifest = self._verified(path)
        step = checkpoint_folder.step_of(path, manifest)
        if not manifest.resumable:
            raise CheckpointError(
                f"resume_from_checkpoint: {path} holds the model alone (save_only_model: true), so no run can continue from "
                f"it; {_begin_with(path)}"
            )
        self.checkpointer.kept = (path,)
        descended = [
            one
            for one in self._usable()
            if _origin(one) == manifest.digest and one.step > step and not one.is_model_only
        ]
        if descended and not (self.overwrite and self._is_finished(descended[-1])):
            chosen, faults = self.checkpointer.newest_whole(descended)
            self._report_faults(faults, chosen)
            if chosen is not None:
                self.session.report(f"note: {chosen.path.name} comes from resume_from_checkpoint {path} and is newer")
                return self._continue(chosen)
        same = any(one.manifest is not None and one.manifest.digest == manifest.digest for one in self.own)
        others = [one for one in self._usable() if not same and _origin(one) != manifest.digest]
        if others and not self.overwrite:
            raise CheckpointError(
                f"output_dir: {self.session.output_dir} holds {others[-1].path.name} of another run than "
                f"resume_from_checkpoint: {path}; use another output_dir or overwrite_output_dir: true"
            )
        later = [one for one in self.own if self.overwrite or (one.is_usable and one.step > step)]
        self.checkpointer.superseded = [
            one for one in later if one.may_be_replaced and one.path.resolve() != path.resolve()
        ]
        self.checkpointer.lineage = Lineage(_new_name(), manifest.digest, self.overwrite)
        return path

    def _verified(self, path: Path) -> Manifest:
        try:
            return self.checkpointer.verify(path)
        except CheckpointError as error:
            tool = checkpoint_folder.foreign_tool(path)
            inside = [one.path.name for one in checkpoint_folder.survey(path)]
            if tool is not None:
                raise CheckpointError(
                    f"resume_from_checkpoint: {path} is a checkpoint of {tool}, not of dataflex_mega, so no run with a role "
                    f"can continue from it; {_begin_with(path)}"
                ) from error
            if inside:
                raise CheckpointError(
                    f"resume_from_checkpoint: {path} is no checkpoint; name one of {', '.join(inside)} in it"
                ) from error
            raise CheckpointError(f"resume_from_checkpoint: {error}") from error

    def _pass_over_models(self, chosen: CheckpointFolder | None) -> None:
        """Say which newer checkpoints a run cannot continue from. Raises CheckpointError when there are no others: what has
        been trained would be replaced."""
        first = -1 if chosen is None else chosen.step
        models = [one for one in self._usable() if one.is_model_only and one.step > first]
        if not models:
            return
        name = models[-1].path.name
        if chosen is None and self.requested is not False:
            raise CheckpointError(
                f"output_dir: {models[-1].path} holds the model alone (save_only_model: true), so no run can continue from "
                f"it; {START_OVER}, another output_dir leaves it, and {_begin_with(models[-1].path)}"
            )
        self.session.report(f"note: {name} holds the model alone (save_only_model: true) and is passed over")

    def _or_anew(self) -> Path | None:
        """overwrite_output_dir: begin anew, unless an unfinished run was itself begun so: it was interrupted."""
        mine = [one for one in self._usable() if one.manifest and one.manifest.lineage.overwrites]
        if mine and self.requested is not False and not self._is_finished(mine[-1]):
            run = mine[-1].manifest.lineage.run if mine[-1].manifest else ""
            chosen, faults = self.checkpointer.newest_whole(
                [one for one in mine if _run(one) == run and not one.is_model_only]
            )
            if chosen is not None and not self.checkpointer.differences(read_state(chosen.path)["identity"]):
                self._report_faults(faults, chosen)
                self.session.report(
                    f"note: overwrite_output_dir: {chosen.path.name} is of the unfinished run that this command began, "
                    "which goes on; remove it to begin at step 0"
                )
                return self._continue(chosen)
        self.starts_over = True
        self.checkpointer.superseded = [one for one in self.own if one.may_be_replaced]
        return self._anew(Lineage(_new_name(), None, overwrites=True))

    def _anew(self, lineage: Lineage) -> None:
        self.checkpointer.lineage = lineage

    def _continue(self, chosen: CheckpointFolder) -> Path:
        """Go on with the run of a checkpoint in output_dir. What it superseded and a kill left there goes later."""
        assert chosen.manifest is not None
        lineage = chosen.manifest.lineage
        self.checkpointer.lineage = Lineage(lineage.run or _new_name(), lineage.resumed_from, lineage.overwrites)
        self.checkpointer.superseded = [one for one in self.own if one.path in self.void]
        return chosen.path

    def _usable(self) -> list[CheckpointFolder]:
        return [one for one in self.own if one.is_usable and one.path not in self.void]

    def _is_finished(self, one: CheckpointFolder) -> bool:
        """Whether run.json says that the run of a checkpoint is over, or names another one."""
        record = run_on_main(self.checkpointer.collectives, partial(RunRecord.read, self.session.output_dir))
        return record is not None and (record.finished or record.run != _run(one))

    def _report_faults(self, faults: list[str], chosen: CheckpointFolder | None) -> None:
        using = "" if chosen is None else f"; using {chosen.path.name}"
        self.session.report(*(f"note: {fault}{using}" for fault in faults))

    def check_collisions(self, first_step: int, last_step: int) -> None:
        """Raises CheckpointError when a folder that is not ours has the name of a checkpoint that this run may write."""
        for one in self.found:
            if first_step < one.step <= last_step and not one.may_be_replaced:
                whose = f"is of {one.foreign}" if one.foreign else one.fault or "is a symbolic link"
                raise CheckpointError(
                    f"output_dir: {one.path} {whose}; this run may write a checkpoint of that name; move it away or "
                    "use another output_dir"
                )
            if not one.is_own:
                self.session.report(f"note: {one.path} is of {one.foreign} and is left alone")


def _begin_with(path: Path) -> str:
    """How a new run begins with the weights of a folder."""
    if (path / "adapter_config.json").is_file():
        return f"adapter_name_or_path: {path} begins a new run with its adapter"
    if (path / "config.json").is_file():
        return f"model_name_or_path: {path} begins a new run with its weights"
    return "model_name_or_path (of an adapter adapter_name_or_path) begins a new run with its weights"


def _origin(one: CheckpointFolder) -> str | None:
    return None if one.manifest is None else one.manifest.lineage.resumed_from


def _run(one: CheckpointFolder) -> str:
    return "" if one.manifest is None else one.manifest.lineage.run


def _new_name() -> str:
    return secrets.token_hex(8)


def _checkpointer(
    session: Session, roles: RunRoles, data: RunData, schedule: RunSchedule, reference: ReferenceLossCache | None
) -> Checkpointer:
    config = session.config
    run_identity: dict[str, Any] = identity(
        config, schedule.partition.global_batch_size, _data_identity(session, data), dict(roles.specs)
    )
    run_identity.update(ordering.fingerprint(schedule.score_source))
    if reference is not None:
        run_identity["reference"] = reference.identity["model"]
    if config.dataflex.init_mixture_proportions_file is not None:
        run_identity["init_mixture_proportions"] = list(schedule.domains.initial_proportions)
    limit, ignored = session.args.training.save_total_limit, (*config.dataflex.resume_ignore, *UNCOMPARED)
    return Checkpointer(session.output_dir, session.collectives, run_identity, limit, ignored)


def _data_identity(session: Session, data: RunData) -> dict[str, str]:
    """A hash of all rows by domain, and of all rows of the evaluation sets, which may be targets of a selection."""
    info, gather = session.parallel_info, session.collectives.all_gather_objects
    hashes = dict(content_hashes(data.pool, info.rank, info.world_size, gather))
    for name, pool in data.evaluation.items():
        for content in content_hashes(pool, info.rank, info.world_size, gather).values():
            hashes[f"evaluation set {name}".strip()] = content
    return hashes


def _open_folder(folder: Path) -> None:
    """Make output_dir where it is missing, and clean up after a killed run. Raises CheckpointError when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint_folder.recover(folder)
    except OSError as error:
        raise CheckpointError(f"output_dir: {error.filename or folder}: {error.strerror}") from error
