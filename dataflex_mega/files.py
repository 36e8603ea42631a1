"""Durable and atomic writing: a file or folder appears under its name complete or not at all, also after a power failure.

Content is written under a temporary name in the same folder and flushed to the disk. The rename is the last act, and the
folder that holds the new name is flushed after it. All renames of the package are made here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # a name that `temporary_path` made
REPLACED = ".replaced-"  # prefix of a folder whose successor is being renamed in


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a whole file; text is encoded as UTF-8. Raises OSError, and leaves a former file of that name as it was."""
    with atomic_file(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream whose content appears as `path` when the block ends; after an exception nothing appears."""
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as stream:
            yield stream
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left in a folder. Only who holds its lock may do that."""
    for path in folder.iterdir():
        if not LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_file(source: Path, target: Path) -> None:
    """Rename a finished file of the same folder, over a former `target`; its content reaches the disk first."""
    fsync_file(source)
    source.replace(target)
    fsync_directory(target.parent)


def replace_folder(source: Path, target: Path) -> None:
    """Rename a finished folder beside `target`, over a former `target`; all its content reaches the disk first.

    The former one is renamed aside and removed when the new one is durable. A power failure in between leaves it aside:
    `restore_replaced` brings it back.
    """
    fsync_tree(source)
    aside = target.with_name(REPLACED + target.name)
    if os.path.lexists(target):
        remove_tree(aside)
        target.rename(aside)
    source.rename(target)
    fsync_directory(target.parent)
    remove_tree(aside)


def restore_replaced(target: Path) -> None:
    """Undo or finish what `replace_folder` was doing with `target` when the power failed."""
    aside = target.with_name(REPLACED + target.name)
    if not os.path.lexists(target):
        aside.rename(target)
        fsync_directory(target.parent)
    remove_tree(aside)


def remove_tree(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_tree(folder: Path) -> None:
    """Flush every file of a folder to the disk, then its folders and itself."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_directory(path)
        else:
            fsync_file(path)
    fsync_directory(folder)


def append_durably(path: Path, text: str) -> None:
    """Append to a file and flush it to the disk. A kill may leave the beginning of `text` alone."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def close_durably(stream: IO[Any]) -> None:
    """Close a file that was written, after its content has reached the disk."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def fsync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    _fsync(path)


def fsync_directory(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a power failure."""
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
