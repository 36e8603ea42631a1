"""Checkpoints that neither a kill nor a power failure breaks: written beside, flushed, checked by hash, renamed in last.

    checkpoint-120/
      engine/            parameters, optimizer, learning-rate scheduler, in the engine's own format
      state.json         step, plan, counters, algorithm state, identity and configuration of the run; tensors by name only
      state.safetensors  the tensors of state.json
      rng-0.safetensors  random generators of rank 0; one file per rank
      manifest.json      step, lineage, size and SHA-256 of every other file; a folder without it is no checkpoint
      model.safetensors, config.json, adapter_model.safetensors, ... the model or adapter for other programs; see `Contents`

The state does not depend on the number of processes. It names the data and the configuration that it belongs to, and any
other run is refused with the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

import dataflex_mega.checkpoint_folder as checkpoint_folder
import dataflex_mega.checkpoint_format as checkpoint_format
from dataflex_mega.checkpoint_folder import PREFIX, WRITING, CheckpointFolder
from dataflex_mega.checkpoint_format import ENGINE, MANIFEST, STATE, TENSORS, VERSION, FileHash, Lineage, Manifest
from dataflex_mega.distributed.agreement import run_and_agree, run_on_main
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import flushing, remove_tree, replace_folder
from dataflex_mega.log_files import flush_logs
from dataflex_mega.redaction import without_secrets
from dataflex_mega.types import SamplingPlan, TrainState


class EngineState(Protocol):
    """What an engine saves and loads; see engines.base.Engine."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...
    def rng_state(self) -> dict[str, Any]: ...
    def set_rng_state(self, state: dict[str, Any]) -> None: ...
    def export(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Contents:
    """What a checkpoint has beside its state.

    Attributes:
        resumable: what a run continues from: parameters, optimizer, random generators.
        model: the model or the adapter in Hugging Face layout.
        companions: writes into a folder what belongs to such a model; the main process calls it.
        configuration: the keys that say how the model is built; plain values.
    """

    resumable: bool = True
    model: bool = False
    companions: Callable[[Path], object] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpointer:
    """Saves to and restores from `folder`/checkpoint-N. Every rank holds one and makes the same calls."""

    folder: Path
    collectives: Collectives
    identity: dict[str, Any]  # what a checkpoint must agree with, by name; JSON values
    save_total_limit: int | None = None  # how many checkpoints stay; None: all
    ignored_differences: tuple[str, ...] = ()  # names of `identity` that may differ (the key resume_ignore)
    lineage: Lineage = field(default_factory=Lineage)
    superseded: list[CheckpointFolder] = field(default_factory=list)  # they go when the next checkpoint is durable
    former_logs: Path | None = None  # a folder that goes with them
    kept: tuple[Path, ...] = ()  # never removed: the checkpoint that resume_from_checkpoint names
    contents: Contents = field(default_factory=Contents)
    best: Callable[[], Path | None] | None = None  # the checkpoint of the best evaluation, which is not removed either

    @property
    def _rank(self) -> int:
        return self.collectives.parallel_info.rank

    @property
    def _world_size(self) -> int:
        return self.collectives.parallel_info.world_size

    # -- writing -------------------------------------------------------------------------------------------------

    def make_resumable(self) -> bool:
        """From now on save what a run can continue from -> whether that was not so before."""
        changes = not self.contents.resumable
        self.contents = replace(self.contents, resumable=True)
        return changes

    def save(self, state: TrainState, engine: EngineState, extra: dict[str, Any]) -> Path:
        """Write a checkpoint of `state.step` -> its folder. `extra`: any nesting of JSON values and tensors, equal on all
        ranks. An older checkpoint of the same step is replaced; one of another tool is not.

        When this returns, all of it is on the disk, and only then were older ones removed. Raises CheckpointError or
        OSError, on all ranks the same, when it cannot be written.
        """
        final, writing = self.folder / f"{PREFIX}{state.step}", self.folder / f"{WRITING}{state.step}"
        resumable = self.contents.resumable
        run_on_main(self.collectives, partial(self._open, writing, final))
        with flushing(writing) as flush:  # every rank flushes every file: on a shared file system only its writer can
            if resumable:
                run_on_main(self.collectives, (writing / ENGINE).mkdir)
                engine.save_state(writing / ENGINE)
                rng = writing / f"rng-{self._rank}.safetensors"
                run_and_agree(self.collectives, partial(checkpoint_format.write_tensors, engine.rng_state(), rng))
            if self.contents.model:
                engine.export(writing)
                run_on_main(self.collectives, partial(self._write_companions, writing))
            content = self._content(state, extra if resumable else {})
            run_on_main(self.collectives, partial(_write_state, writing, content))
            hashes = self._hashes(writing)
            run_and_agree(self.collectives, flush)  # all have flushed, so the folder may get its name
        run_on_main(self.collectives, partial(self._publish, writing, final, state.step, hashes))
        self.superseded, self.lineage = [], replace(self.lineage, supersedes=())
        return final

    def _open(self, writing: Path, final: Path) -> None:
        if final.exists() and not checkpoint_folder.inspect(final).may_be_replaced:
            raise CheckpointError(f"{final} is not a checkpoint of this run and is not overwritten; move it away")
        flush_logs(self.folder)  # after a power failure they reach at least as far as the checkpoint
        remove_tree(writing)
        writing.mkdir()

    def _write_companions(self, folder: Path) -> None:
        checkpoint_format.name_single_file(folder)
        if self.contents.companions is not None:
            self.contents.companions(folder)

    def _content(self, state: TrainState, extra: dict[str, Any]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "world_size": self._world_size,
            "identity": self.identity,
            "configuration": self.contents.configuration,
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "samples_seen": state.samples_seen,
            "plan": {f.name: getattr(state.plan, f.name) for f in fields(SamplingPlan)},
            "extra": extra,
        }

    def _hashes(self, folder: Path) -> dict[str, FileHash]:
        """File name -> size and SHA-256. Every rank hashes some of the files."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        mine = files[self._rank :: self._world_size]
        local = run_and_agree(self.collectives, lambda: {str(p.relative_to(folder)): FileHash.of(p) for p in mine})
        by_rank = self.collectives.all_gather_objects(local)
        return {name: value for hashes in by_rank for name, value in hashes.items()}

    def _publish(self, writing: Path, final: Path, step: int, hashes: dict[str, FileHash]) -> None:
        void = [one.manifest.digest for one in self.superseded if one.manifest is not None and one.path != final]
        lineage = replace(self.lineage, supersedes=tuple(void))
        Manifest(VERSION, step, lineage, dict(sorted(hashes.items()))).write(writing)
        replace_folder(writing, final)
        self._remove_superseded(final)
        found = checkpoint_folder.survey(self.folder)
        best = self._best()
        for path in checkpoint_folder.choose_for_removal(found, step, self.save_total_limit, self._kept(), best):
            checkpoint_folder.remove(path)

    def finish(self) -> None:
        """The training is over and its results are written: what it supersedes goes, even if it has saved nothing.

        With save_total_limit 1, of the best checkpoint and the last one the best stays, as in Hugging Face's Trainer.
        """
        run_on_main(self.collectives, self._remove_superseded)
        self.superseded = []
        if self.save_total_limit == 1 and self.best is not None:
            run_on_main(self.collectives, self._remove_all_but_best)

    def _remove_all_but_best(self) -> None:
        best = self._best()
        found = [one for one in checkpoint_folder.survey(self.folder) if one.is_usable]
        if best is None or best not in [one.path.resolve() for one in found]:
            return
        for one in found:
            if one.path.resolve() != best and one.path.resolve() not in self._kept():
                checkpoint_folder.remove(one.path)

    def _best(self) -> Path | None:
        path = None if self.best is None else self.best()
        return None if path is None else path.resolve()

    def _remove_superseded(self, written: Path | None = None) -> None:
        for old in self.superseded:
            if old.path != written and old.path.resolve() not in self._kept() and old.path.is_dir():
                checkpoint_folder.remove(old.path)
        if self.former_logs is not None:
            remove_tree(self.former_logs)

    def _kept(self) -> set[Path]:
        return {path.resolve() for path in self.kept}

    # -- reading -------------------------------------------------------------------------------------------------

    def survey(self) -> list[CheckpointFolder]:
        """The `checkpoint-N` in `folder`, by step; equal on all ranks."""
        return run_on_main(self.collectives, partial(checkpoint_folder.survey, self.folder))

    def newest_whole(self, candidates: Sequence[CheckpointFolder]) -> tuple[CheckpointFolder | None, list[str]]:
        """(the newest of `candidates` without a fault, each with every file hashed, or None; the faults of the newer ones,
        a line for each). Equal on all ranks."""
        faults: list[str] = []
        for candidate in reversed(candidates):
            fault = candidate.fault or next(iter(self._integrity_errors(candidate.path)), None)
            if fault is None:
                return candidate, faults
            name = candidate.path.name
            faults.append(f"{name} {fault}" if candidate.is_renamed else f"{name} is damaged ({fault})")
        return None, faults

    def verify(self, path: Path) -> Manifest:
        """Hash every file of a checkpoint, wherever it lies -> its manifest. Raises CheckpointError naming what is wrong."""
        errors = self._integrity_errors(path)
        if errors:
            raise CheckpointError(f"{path} is damaged: {errors[0]}")
        manifest = Manifest.read(path)
        checkpoint_folder.step_of(path, manifest)
        return manifest

    def _integrity_errors(self, folder: Path) -> list[str]:
        """What is wrong with a folder's files, sorted; every rank hashes some of them."""
        try:
            manifest = Manifest.read(folder)
            errors = manifest.faults(folder, sorted(manifest.files)[self._rank :: self._world_size])
            if self._rank == 0 and not errors and manifest.version == VERSION:
                saved = checkpoint_format.read_state(folder)["step"]
                errors = [] if saved == manifest.step else [f"{STATE} is of step {saved}"]
        except (checkpoint_format.Damaged, CheckpointError) as damage:
            errors = [str(damage).rpartition(" is damaged: ")[2]]
        return sorted({error for rank_errors in self.collectives.all_gather_objects(errors) for error in rank_errors})

    def restore(self, path: Path, engine: EngineState) -> tuple[TrainState, dict[str, Any]]:
        """Load a checkpoint into the engine -> (state, extra). Raises CheckpointError when it belongs to another run.

        Random generators are restored where the number of processes is the same.
        """
        saved = self.read(path)
        engine.load_state(path / ENGINE)
        if saved["world_size"] == self._world_size:
            engine.set_rng_state(checkpoint_format.read_tensors(path, f"rng-{self._rank}.safetensors"))
        values = ((f.name, saved["plan"][f.name]) for f in fields(SamplingPlan))
        plan: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
        state = TrainState(saved["step"], SamplingPlan(**plan), saved["tokens_seen"], saved["samples_seen"])
        return state, saved["extra"]

    def load_model(self, path: Path, engine: EngineState) -> int:
        """Bring the engine to the parameters of a checkpoint of this run -> its step. Raises CheckpointError for a damaged
        one, on all ranks, before anything is loaded."""
        manifest = self.verify(path)
        engine.load_state(path / ENGINE)
        return checkpoint_folder.step_of(path, manifest)

    def read(self, path: Path) -> dict[str, Any]:
        """state.json with its tensors. Loads nothing into the engine.

        Raises:
            CheckpointError: it is not a checkpoint, of another format version, or of another run.
        """
        saved = checkpoint_format.read_state(path)
        self._check_identity(path, saved["identity"])
        try:
            return checkpoint_format.insert_tensors(saved, checkpoint_format.read_tensors(path))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {TENSORS} has no tensor {error}") from error

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What the identity of a checkpoint has otherwise than this run, a text for each name."""
        saved = without_secrets(saved)  # those of older versions have some
        return [
            f"{name}: {checkpoint_format.abbreviate(saved.get(name))} there, "
            f"{checkpoint_format.abbreviate(self.identity.get(name))} here"
            for name in sorted(set(saved) | set(self.identity))
            if name not in self.ignored_differences
            and checkpoint_format.to_builtin(saved.get(name)) != checkpoint_format.to_builtin(self.identity.get(name))
        ]

    def _check_identity(self, path: Path, saved: dict[str, Any]) -> None:
        differences = self.differences(saved)
        if differences:
            hint = "another output_dir, overwrite_output_dir: true, or resume_ignore: [...] with the names to accept"
            raise CheckpointError(f"{path} belongs to another run: {'; '.join(differences)} (use {hint})")


def _write_state(folder: Path, content: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    checkpoint_format.write_json(folder / STATE, checkpoint_format.extract_tensors(content, "", tensors))
    checkpoint_format.write_tensors(tensors, folder / TENSORS)
