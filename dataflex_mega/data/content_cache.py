"""Hashes of rows, kept beside the files that hold the rows: a later run of the same files need not read all tokens.

A hash is taken again only while every file has the size, the time of change and the inode that it had, and the rows are the
same part of it (`key`). A folder that cannot be written keeps nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dataflex_mega.json_text as json_text
from dataflex_mega.files import atomic_write

SUFFIX = ".content.json"
MOST = 64  # hashes beside one file: of other parts of it


def read(files: Sequence[Path], key: str) -> str | None:
    """The hash of the rows `key` of these files; None when it is not known, or a file has changed."""
    kept = _read(files)
    try:
        found = kept.get(key)
        return str(found["hash"]) if isinstance(found, dict) and found.get("files") == _states(files) else None
    except (OSError, KeyError):
        return None


def write(files: Sequence[Path], key: str, digest: str) -> None:
    """Keep a hash, if that can be done."""
    with contextlib.suppress(OSError):
        kept = {**_read(files), key: {"hash": digest, "files": _states(files)}}
        atomic_write(_beside(files), json.dumps(dict(list(kept.items())[-MOST:])))


def _read(files: Sequence[Path]) -> dict[str, Any]:
    try:
        content = json_text.read(_beside(files))
    except (OSError, ValueError):  # nobody's loss: it is computed again
        return {}
    return content if isinstance(content, dict) else {}


def _beside(files: Sequence[Path]) -> Path:
    return files[0].with_name(files[0].name + SUFFIX)


def _states(files: Sequence[Path]) -> list[list[Any]]:
    statuses = [(file, file.stat()) for file in files]
    return [[str(file), status.st_size, status.st_mtime_ns, status.st_ino] for file, status in statuses]
