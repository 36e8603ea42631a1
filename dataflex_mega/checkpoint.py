"""Checkpoints that a kill cannot break: written beside, checked by hash, renamed in as the last act.

    checkpoint-120/
      engine/          parameters, optimizer, schedule (the engine's own format)
      state.json       step, plan, counters, algorithm state, what the run is; tensors are named, not held
      state.safetensors  the tensors of state.json
      rng-0.safetensors  random generators of each rank
      manifest.json    size and SHA-256 of every other file; a folder without it does not count

State does not depend on the number of processes. It says which data and configuration it belongs to, and any other run
is refused with the difference named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from dataflex_mega.errors import CheckpointError
from dataflex_mega.types import Plan, TrainState

VERSION = 1
PREFIX, TEMPORARY = "checkpoint-", ".writing-checkpoint-"


class Stateful(Protocol):
    """The parts of a run that are saved."""

    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...
    def rng_state(self) -> dict[str, Any]: ...
    def set_rng_state(self, state: dict[str, Any]) -> None: ...


class Ranks(Protocol):
    """What is needed of distributed.Collectives."""

    @property
    def mesh(self) -> Any: ...
    def barrier(self) -> None: ...
    def gather_objects(self, value: Any) -> list[Any]: ...
    def share_main(self, value: Any) -> Any: ...


@dataclass
class Checkpointer:
    """Saves to and restores from `folder`/checkpoint-N."""

    folder: Path
    ranks: Ranks
    identity: dict[str, Any]  # what a checkpoint must agree with; plain values
    keep: int | None = None  # save_total_limit
    accept: tuple[str, ...] = ()  # names of `identity` that may differ

    # -- writing -------------------------------------------------------------------------------------------------

    def save(self, state: TrainState, engine: Stateful, extra: dict[str, Any]) -> Path:
        """Every rank calls it. `extra` is any nesting of plain values and tensors, equal on all ranks."""
        final = self.folder / f"{PREFIX}{state.step}"
        writing = self.folder / f"{TEMPORARY}{state.step}"
        rank, world = self.ranks.mesh.rank, self.ranks.mesh.world
        if rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            (writing / "engine").mkdir(parents=True)
        self.ranks.barrier()
        engine.save_state(writing / "engine")
        save_file(engine.rng_state(), writing / f"rng-{rank}.safetensors")
        self.ranks.barrier()
        if rank == 0:
            self._write_state(writing, state, extra, world)
        self.ranks.barrier()
        hashes = self._hashes(writing)
        if rank == 0:
            _write_json(writing / "manifest.json", {"version": VERSION, "files": hashes})
            shutil.rmtree(final, ignore_errors=True)  # a damaged one, or one that was passed over on purpose
            writing.rename(final)
            _sync_folder(self.folder)
            self._prune()
        self.ranks.barrier()
        return final

    def _write_state(self, folder: Path, state: TrainState, extra: dict[str, Any], world: int) -> None:
        tensors: dict[str, torch.Tensor] = {}
        whole = {
            "version": VERSION,
            "world": world,
            "identity": self.identity,
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "samples_seen": state.samples_seen,
            "plan": {f.name: getattr(state.plan, f.name) for f in fields(Plan)},
            "extra": extra,
        }
        _write_json(folder / "state.json", _lift_tensors(whole, "", tensors))
        save_file(tensors, folder / "state.safetensors")

    def _hashes(self, folder: Path) -> dict[str, Any]:
        """File -> size and hash, the work divided over ranks."""
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
        mine = files[self.ranks.mesh.rank :: self.ranks.mesh.world]
        found = {str(p.relative_to(folder)): _fingerprint(p) for p in mine}
        return {name: value for part in self.ranks.gather_objects(found) for name, value in part.items()}

    def _prune(self) -> None:
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.keep and self.keep > 0:
            for step in _steps(self.folder)[: -self.keep]:
                shutil.rmtree(self.folder / f"{PREFIX}{step}")

    # -- reading -------------------------------------------------------------------------------------------------

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and one line for each damaged one that was passed over. Equal on all ranks."""
        notes: list[str] = []
        for step in reversed(self.ranks.share_main(_steps(self.folder))):
            candidate = self.folder / f"{PREFIX}{step}"
            faults = sorted({f for part in self.ranks.gather_objects(self._faults(candidate)) for f in part})
            if not faults:
                return candidate, notes
            notes.append(f"{candidate} is damaged ({faults[0]}); looking for an older one")
        return None, notes

    def _faults(self, folder: Path) -> list[str]:
        """What is wrong with this rank's share of the files."""
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            return ["manifest.json is missing"]
        try:
            files = json.loads(manifest.read_text())["files"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            return ["manifest.json cannot be read"]
        faults = []
        for name in sorted(files)[self.ranks.mesh.rank :: self.ranks.mesh.world]:
            path = folder / name
            if not path.is_file():
                faults.append(f"{name} is missing")
            elif path.stat().st_size != files[name]["size"]:
                faults.append(f"{name} has {path.stat().st_size} bytes instead of {files[name]['size']}")
            elif _fingerprint(path) != files[name]:
                faults.append(f"{name} has another SHA-256 than when it was written")
        return faults

    def restore(self, path: Path, engine: Stateful) -> tuple[TrainState, dict[str, Any]]:
        """Load a checkpoint into the engine -> (state, extra). Raises CheckpointError when it is another run's."""
        saved = self.read(path)
        engine.load_state(path / "engine")
        if saved["world"] == self.ranks.mesh.world:
            engine.set_rng_state(load_file(path / f"rng-{self.ranks.mesh.rank}.safetensors"))
        names = {f.name for f in fields(Plan)}
        plan: dict[str, Any] = {
            n: tuple(v) if isinstance(v, list) else v for n, v in saved["plan"].items() if n in names
        }
        state = TrainState(saved["step"], Plan(**plan), saved["tokens_seen"], saved["samples_seen"])
        return state, saved["extra"]

    def read(self, path: Path) -> dict[str, Any]:
        """state.json with its tensors, after checking that it belongs to this run. Touches no model."""
        state_file = path / "state.json"
        if not state_file.is_file():
            raise CheckpointError(f"{path} is not a checkpoint of dataflex_mega: state.json is missing")
        saved = json.loads(state_file.read_text())
        if saved.get("version") != VERSION:
            raise CheckpointError(f"{path} has format version {saved.get('version')}, this program reads {VERSION}")
        self._check_identity(path, saved["identity"])
        return _lower_tensors(saved, load_file(path / "state.safetensors"))

    def _check_identity(self, path: Path, found: dict[str, Any]) -> None:
        differences = [
            f"{name}: {_show(found.get(name))} there, {_show(self.identity.get(name))} here"
            for name in sorted(set(found) | set(self.identity))
            if name not in self.accept and _plain(found.get(name)) != _plain(self.identity.get(name))
        ]
        if differences:
            hint = "another output_dir, overwrite_output_dir: true, or resume_ignore: [...] with the names to accept"
            raise CheckpointError(f"{path} belongs to another run: {'; '.join(differences)} (use {hint})")


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, oldest first."""
    names = [p.name.removeprefix(PREFIX) for p in folder.glob(f"{PREFIX}*") if p.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def discard_after(folder: Path, step: int) -> int:
    """Remove the checkpoints in `folder` beyond `step`, which a run that starts there will write anew -> how many."""
    steps = [found for found in _steps(folder) if found > step]
    for step in steps:
        shutil.rmtree(folder / f"{PREFIX}{step}")
    return len(steps)


def truncate_log(path: Path, step: int, key: str = "step") -> None:
    """Drop the lines of a JSON-lines file that lie after `step`: they will be written again. Half a line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row.get(key, 0) <= step:
            kept.append(line)
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in kept))
    beside.replace(path)


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


def _sync_folder(folder: Path) -> None:
    """Make the rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    """As JSON would give it back, so that tuples equal lists."""
    return json.loads(json.dumps(value, default=_as_json))


def _show(value: Any) -> str:
    text = json.dumps(value, default=_as_json)
    return text if len(text) <= 120 else text[:117] + "..."


def _lift_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace tensors by {"tensor": name} and collect them."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _lift_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_lift_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _lower_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_lift_tensors` (tuples come back as lists)."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _lower_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_lower_tensors(item, tensors) for item in value]
    return value
