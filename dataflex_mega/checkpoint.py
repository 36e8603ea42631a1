"""Checkpoints that a kill cannot break: written beside, checked by hash, renamed in as the last act.

    checkpoint-120/
      engine/            parameters, optimizer, learning-rate scheduler, in the engine's own format
      state.json         step, plan, counters, algorithm state, identity of the run; tensors by name only
      state.safetensors  the tensors of state.json
      rng-0.safetensors  random generators of rank 0; one file per rank
      manifest.json      size and SHA-256 of every other file; a folder without it is no checkpoint

The state does not depend on the number of processes. It names the data and the configuration that it belongs to, and any
other run is refused with the difference.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import atomic_write, replace_folder
from dataflex_mega.types import SamplingPlan, TrainState

VERSION = 2
PREFIX, TEMPORARY = "checkpoint-", ".writing-checkpoint-"


class EngineState(Protocol):
    """What an engine saves and loads; see engines.base.Engine."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...
    def rng_state(self) -> dict[str, Any]: ...
    def set_rng_state(self, state: dict[str, Any]) -> None: ...


@dataclass
class Checkpointer:
    """Saves to and restores from `folder`/checkpoint-N. Every rank holds one and makes the same calls."""

    folder: Path
    collectives: Collectives
    identity: dict[str, Any]  # what a checkpoint must agree with, by name; JSON values
    save_total_limit: int | None = None  # how many checkpoints stay; None: all
    ignored_differences: tuple[str, ...] = ()  # names of `identity` that may differ (the key resume_ignore)

    @property
    def _rank(self) -> int:
        return self.collectives.parallel_info.rank

    @property
    def _world_size(self) -> int:
        return self.collectives.parallel_info.world_size

    # -- writing -------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, engine: EngineState, extra: dict[str, Any]) -> Path:
        """Write a checkpoint of `state.step` -> its folder. `extra`: any nesting of JSON values and tensors, equal on all
        ranks. An older checkpoint of the same step is replaced."""
        final = self.folder / f"{PREFIX}{state.step}"
        writing = self.folder / f"{TEMPORARY}{state.step}"
        if self._rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            (writing / "engine").mkdir(parents=True)
        self.collectives.barrier()
        engine.save_state(writing / "engine")
        save_file(engine.rng_state(), writing / f"rng-{self._rank}.safetensors")
        self.collectives.barrier()
        if self._rank == 0:
            self._write_state(writing, state, extra)
        self.collectives.barrier()
        hashes = self._hashes(writing)
        if self._rank == 0:
            _write_json(writing / "manifest.json", {"version": VERSION, "files": hashes})
            replace_folder(writing, final)  # over a damaged one, or one that was passed over on purpose
            self._prune()
        self.collectives.barrier()
        return final

    def _write_state(self, folder: Path, state: TrainState, extra: dict[str, Any]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        content = {
            "version": VERSION,
            "world_size": self._world_size,
            "identity": self.identity,
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "samples_seen": state.samples_seen,
            "plan": {f.name: getattr(state.plan, f.name) for f in fields(SamplingPlan)},
            "extra": extra,
        }
        _write_json(folder / "state.json", _extract_tensors(content, "", tensors))
        save_file(tensors, folder / "state.safetensors")

    def _hashes(self, folder: Path) -> dict[str, Any]:
        """File name -> size and SHA-256. Every rank hashes some of the files."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
        local = {str(p.relative_to(folder)): _fingerprint(p) for p in files[self._rank :: self._world_size]}
        by_rank = self.collectives.all_gather_objects(local)
        return {name: value for hashes in by_rank for name, value in hashes.items()}

    def _prune(self) -> None:
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.save_total_limit and self.save_total_limit > 0:
            for step in _steps(self.folder)[: -self.save_total_limit]:
                shutil.rmtree(self.folder / f"{PREFIX}{step}")

    # -- reading -------------------------------------------------------------------------------------------------

    def latest(self) -> tuple[Path | None, list[str]]:
        """(the newest undamaged checkpoint or None, a line for each damaged one that is newer). Equal on all ranks."""
        notes: list[str] = []
        for step in reversed(self.collectives.broadcast_object(_steps(self.folder))):
            candidate = self.folder / f"{PREFIX}{step}"
            by_rank = self.collectives.all_gather_objects(self._integrity_errors(candidate))
            errors = sorted({error for errors in by_rank for error in errors})
            if not errors:
                return candidate, notes
            notes.append(f"{candidate} is damaged ({errors[0]}); looking for an older one")
        return None, notes

    def _integrity_errors(self, folder: Path) -> list[str]:
        """What is wrong with the files that this rank checks; every rank checks some of them."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            return ["manifest.json is missing"]
        try:
            files = json.loads(manifest.read_text())["files"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            return ["manifest.json cannot be read"]
        errors = []
        for name in sorted(files)[self._rank :: self._world_size]:
            path = folder / name
            if not path.is_file():
                errors.append(f"{name} is missing")
            elif path.stat().st_size != files[name]["size"]:
                errors.append(f"{name} has {path.stat().st_size} bytes instead of {files[name]['size']}")
            elif _fingerprint(path) != files[name]:
                errors.append(f"{name} has another SHA-256 than when it was written")
        return errors

    def restore(self, path: Path, engine: EngineState) -> tuple[TrainState, dict[str, Any]]:
        """Load a checkpoint into the engine -> (state, extra). Raises CheckpointError when it belongs to another run.

        Random generators are restored where the number of processes is the same.
        """
        saved = self.read(path)
        engine.load_state(path / "engine")
        if saved["world_size"] == self._world_size:
            engine.set_rng_state(load_file(path / f"rng-{self._rank}.safetensors"))
        values = ((f.name, saved["plan"][f.name]) for f in fields(SamplingPlan))
        plan: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values}
        state = TrainState(saved["step"], SamplingPlan(**plan), saved["tokens_seen"], saved["samples_seen"])
        return state, saved["extra"]

    def read(self, path: Path) -> dict[str, Any]:
        """state.json with its tensors. Loads nothing into the engine.

        Raises:
            CheckpointError: it is not a checkpoint, of another format version, or of another run.
        """
        state_file = path / "state.json"
        if not state_file.is_file():
            raise CheckpointError(f"{path} is not a checkpoint of dataflex_mega: state.json is missing")
        saved = json.loads(state_file.read_text())
        if saved.get("version") != VERSION:
            raise CheckpointError(f"{path} has format version {saved.get('version')}, this program reads {VERSION}")
        self._check_identity(path, saved["identity"])
        return _insert_tensors(saved, load_file(path / "state.safetensors"))

    def _check_identity(self, path: Path, saved: dict[str, Any]) -> None:
        differences = [
            f"{name}: {_abbreviate(saved.get(name))} there, {_abbreviate(self.identity.get(name))} here"
            for name in sorted(set(saved) | set(self.identity))
            if name not in self.ignored_differences
            and _to_builtin(saved.get(name)) != _to_builtin(self.identity.get(name))
        ]
        if differences:
            hint = "another output_dir, overwrite_output_dir: true, or resume_ignore: [...] with the names to accept"
            raise CheckpointError(f"{path} belongs to another run: {'; '.join(differences)} (use {hint})")


def _steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending."""
    names = [p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def remove_later_than(folder: Path, step: int) -> int:
    """Remove the checkpoints in `folder` of steps beyond `step`, which a run from there writes again -> their number."""
    later = [saved for saved in _steps(folder) if saved > step]
    for saved in later:
        shutil.rmtree(folder / f"{PREFIX}{saved}")
    return len(later)


def truncate_log(path: Path, step: int, key: str = "step") -> None:
    """Drop the lines of a JSON-lines file whose `key` is beyond `step`, and an incomplete last line: they will be written
    again. Does nothing without the file."""
    if not path.is_file():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row.get(key, 0) <= step:
            lines.append(line)
    atomic_write(path, "".join(line + "\n" for line in lines))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=_as_json))


def _as_json(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")


def _to_builtin(value: Any) -> Any:
    """The value as JSON would return it, so that tuples equal lists."""
    return json.loads(json.dumps(value, default=_as_json))


def _abbreviate(value: Any) -> str:
    text = json.dumps(value, default=_as_json)
    return text if len(text) <= 120 else text[:117] + "..."


def _extract_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace every tensor by {"tensor": name} and put it into `tensors`, on the CPU."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _extract_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_extract_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _insert_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_lift_tensors` (tuples come back as lists)."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _insert_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_insert_tensors(item, tensors) for item in value]
    return value
