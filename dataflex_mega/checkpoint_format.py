"""The files of a checkpoint: its manifest, hashes, and JSON whose tensors lie in a file beside it.

What is read here may be damaged or written by somebody else, so every value is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import atomic_write, system_errors
from dataflex_mega.types import SamplingPlan

FORMAT, VERSION = "dataflex_mega checkpoint", 3
MANIFEST, STATE, TENSORS, ENGINE = "manifest.json", "state.json", "state.safetensors", "engine"
SINGLE_FILE = "model.safetensors"  # of a Hugging Face model that needs no second one
SINGLE_INDEX = f"{SINGLE_FILE}.index.json"
# Errors of reading a file that is damaged, unreadable, nested too deep, or a folder.
UNREADABLE = (OSError, ValueError, RecursionError)
STATE_TYPES: dict[str, type] = {
    "world_size": int, "identity": dict, "step": int, "tokens_seen": int, "samples_seen": int, "plan": dict, "extra": dict,
}  # fmt: skip


class Damaged(Exception):
    """A file of a checkpoint is not what it was when it was written. The message names it, without its folder."""


@dataclass(frozen=True)
class Lineage:
    """Where the checkpoints of one training come from.

    Attributes:
        run: a random name of the training; a run that continues by itself keeps it.
        resumed_from: SHA-256 of the manifest of the checkpoint that resume_from_checkpoint named; None without that key.
        overwrites: whether the training began with overwrite_output_dir.
        supersedes: SHA-256 of the manifests of checkpoints that are void since this training's first checkpoint.
    """

    run: str = ""
    resumed_from: str | None = None
    overwrites: bool = False
    supersedes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileHash:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileHash:
        """Read the whole file."""
        with path.open("rb") as stream:
            return cls(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: what makes a folder a checkpoint of this program. `digest` is the SHA-256 of the file itself."""

    version: int
    step: int | None  # None in the formats before 3
    lineage: Lineage
    files: Mapping[str, FileHash]
    digest: str = ""

    @property
    def resumable(self) -> bool:
        """Whether it has what a run continues from, and not the model alone (save_only_model)."""
        return any(name.startswith(f"{ENGINE}/") for name in self.files)

    def write(self, folder: Path) -> None:
        """Write it into a folder whose other files are complete."""
        content = asdict(self)
        content.pop("digest")
        atomic_write(folder / MANIFEST, json.dumps({"format": FORMAT, **content}, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder. Raises Damaged when it is missing, unreadable or not one of this program."""
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
            content = json.loads(data)
        except FileNotFoundError:
            raise Damaged(f"{MANIFEST} is missing") from None
        except UNREADABLE as error:
            raise Damaged(f"{MANIFEST} cannot be read: {_cause(error)}") from error
        try:
            return _parsed_manifest(content, hashlib.sha256(data).hexdigest())
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{MANIFEST} cannot be read: it has no usable {error.args[0]}") from error

    def faults(self, folder: Path, names: Iterable[str], contents: bool = True) -> list[str]:
        """What is wrong with these files, a line for each; without `contents` only what a look at the folder tells."""
        found = (_fault(folder, name, self.files[name], contents) for name in names)
        return [fault for fault in found if fault is not None]


def _parsed_manifest(content: Any, digest: str) -> Manifest:
    """Raises KeyError, TypeError or ValueError with the name of what is missing or of a wrong type."""
    if not isinstance(content, dict):
        raise TypeError("object")
    version = content["version"]
    if type(version) is not int or version < 1 or (version >= VERSION and content["format"] != FORMAT):
        raise ValueError("version")
    if version > VERSION:
        raise ValueError(f"version: {version} is newer than {VERSION}, which this program reads")
    files = {str(name): _file_hash(name, value) for name, value in _dict(content, "files").items()}
    if STATE not in files or TENSORS not in files:
        raise KeyError(f"files: {STATE}")
    if version < VERSION:
        return Manifest(version, None, Lineage(), files, digest)
    if type(content["step"]) is not int:
        raise TypeError("step")
    return Manifest(version, content["step"], _lineage(_dict(content, "lineage")), files, digest)


def _file_hash(name: str, value: Any) -> FileHash:
    if not isinstance(value, dict) or type(value.get("size")) is not int or not isinstance(value.get("sha256"), str):
        raise TypeError(f"files: {name!r}")
    if not _is_inside(name):
        raise ValueError(f"files: {name!r} is not inside the folder")
    return FileHash(value["size"], value["sha256"])


def _lineage(value: dict[str, Any]) -> Lineage:
    origin, superseded = value["resumed_from"], value["supersedes"]
    if not (
        isinstance(value["run"], str) and isinstance(superseded, list) and (origin is None or isinstance(origin, str))
    ):
        raise TypeError("lineage")
    if not all(isinstance(digest, str) for digest in superseded):
        raise TypeError("lineage: supersedes")
    return Lineage(value["run"], origin, value["overwrites"] is True, tuple(superseded))


def _dict(content: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(content[name], dict):
        raise TypeError(name)
    return content[name]


def _is_inside(name: str) -> bool:
    """Whether a file name of a manifest is one inside the folder."""
    path = PurePosixPath(name)
    return bool(name) and str(path) == name and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _fault(folder: Path, name: str, expected: FileHash, contents: bool) -> str | None:
    path = folder / name
    try:
        links = [part for part in (path, *path.parents[: len(PurePosixPath(name).parts) - 1]) if part.is_symlink()]
        if links:
            return f"{name} is behind a symbolic link"
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        if contents and FileHash.of(path) != expected:
            return f"{name} has another SHA-256 than when it was written"
    except OSError as error:
        return f"{name} cannot be read: {_cause(error)}"
    return None


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "too deeply nested" if isinstance(error, RecursionError) else f"not JSON ({type(error).__name__})"


# -- the state -----------------------------------------------------------------------------------------------------------


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint of this version, its values of the right types, tensors not yet put in.

    Raises CheckpointError when it is damaged or of another version.
    """
    try:
        saved = json.loads((folder / STATE).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint of dataflex_mega: {STATE} is missing") from None
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} is damaged: {STATE} cannot be read: {_cause(error)}") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{folder} is damaged: {STATE} holds a {type(saved).__name__} instead of an object")
    if saved.get("version") != VERSION:
        raise CheckpointError(f"{folder} has format version {saved.get('version')}, this program reads {VERSION}")
    wrong = [name for name, kind in STATE_TYPES.items() if type(saved.get(name)) is not kind]
    wrong += [f"plan: {field.name}" for field in fields(SamplingPlan) if field.name not in (saved.get("plan") or {})]
    if not wrong and "global_batch_size" not in saved["identity"]:
        wrong = ["identity: global_batch_size"]
    if wrong:
        raise CheckpointError(f"{folder} is damaged: {STATE} has no usable {wrong[0]}")
    return saved


def name_single_file(folder: Path) -> None:
    """Write the index of a model whose weights are in one file. vLLM and SGLang read every safetensors file of a folder,
    those of the state too, unless an index says which are the model's."""
    file = folder / SINGLE_FILE
    if not file.is_file():
        return
    with safe_open(str(file), framework="pt") as stored:
        names = sorted(stored.keys())
    content = {"metadata": {"total_size": file.stat().st_size}, "weight_map": dict.fromkeys(names, SINGLE_FILE)}
    write_json(folder / SINGLE_INDEX, content)


def read_tensors(folder: Path, name: str = TENSORS) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    try:
        return load_file(folder / name)
    except (SafetensorError, *UNREADABLE) as error:
        raise CheckpointError(f"{folder} is damaged: {name} cannot be read: {first_words(error)}") from error


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError when the system refuses."""
    with system_errors(path):
        save_file(tensors, path)


def first_words(error: BaseException) -> str:
    """The first line of an error of a library."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def write_json(path: Path, value: Any) -> None:
    """Write JSON; scalars of torch and numpy, and dataclasses, become plain values."""
    path.write_text(json.dumps(value, indent=1, default=_as_json))


def to_builtin(value: Any) -> Any:
    """The value as JSON would return it, so that tuples equal lists."""
    return json.loads(json.dumps(value, default=_as_json))


def abbreviate(value: Any) -> str:
    """The value as JSON, at most 120 characters of it."""
    text = json.dumps(value, default=_as_json)
    return text if len(text) <= 120 else text[:117] + "..."


def _as_json(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")


def extract_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Replace every tensor by {"tensor": name} and put it into `tensors`, on the CPU."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: extract_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [extract_tensors(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def insert_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `extract_tensors` (tuples come back as lists). Raises KeyError for a tensor that is not there."""
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: insert_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [insert_tensors(item, tensors) for item in value]
    return value
