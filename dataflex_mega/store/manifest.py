"""Manifests of the stores: JSON files that say which model and data a folder's content was computed from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_mega.errors import CheckpointError

MANIFEST = "manifest.json"


def read_manifest(path: Path, what: str, version: int) -> dict[str, Any] | None:
    """A manifest with `version`, `identity` and more; None when there is no such file. Raises CheckpointError when it cannot
    be read or has another version; the message begins with `what`."""
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        stored_version, _ = manifest["version"], manifest["identity"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{what}: {path} cannot be read: {error}") from error
    if stored_version != version:
        raise CheckpointError(f"{what}: {path} has version {stored_version}, this program reads {version}")
    return manifest


def read_own_manifest(folder: Path, identity: Mapping[str, Any], what: str, version: int) -> dict[str, Any] | None:
    """The manifest of a folder that has this identity; None when there is none. Raises CheckpointError for another
    identity, and as `read_manifest` does."""
    manifest = read_manifest(folder / MANIFEST, what, version)
    if manifest is not None:
        check_identity(folder, manifest["identity"], identity, what)
    return manifest


def identity_differences(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """`model: abc there, def here; ...` for the entries in which two identities differ; empty when they are equal."""
    plain = json.loads(json.dumps(expected))
    names = [name for name in sorted({*plain, *stored}) if plain.get(name) != stored.get(name)]
    return "; ".join(f"{name}: {stored.get(name)} there, {plain.get(name)} here" for name in names)


def check_identity(folder: Path, stored: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointError that names the differences between a folder's identity and the expected one."""
    differences = identity_differences(stored, expected)
    if differences:
        raise CheckpointError(
            f"{what}: {folder} belongs to something else ({differences}); name another folder or remove it"
        )
