"""What the stores share: files that appear whole or not at all, and folders that say what they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_mega.errors import CheckpointError

MANIFEST = "manifest.json"


def write_beside(path: Path, content: bytes) -> None:
    """Beside, to disk, renamed in."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, what: str, version: int) -> dict[str, Any] | None:
    """A manifest: `version`, `identity` and more; None when there is none. Raises CheckpointError when it cannot be read."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        theirs, _ = found["version"], found["identity"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{what}: {path} cannot be read: {error}") from error
    if theirs != version:
        raise CheckpointError(f"{what}: {path} has version {theirs}, this program reads {version}")
    return found


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """`model: abc there, def here; ...` for what two identities differ in; empty when they are the same."""
    ours = json.loads(json.dumps(mine))
    other = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name}: {theirs.get(name)} there, {ours.get(name)} here" for name in other)


def check_identity(folder: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointError naming what differs between a folder's identity and the one that is wanted."""
    other = differences(theirs, mine)
    if other:
        raise CheckpointError(f"{what}: {folder} belongs to something else ({other}); name another folder or remove it")
