"""Durable and atomic writing: a file or folder appears under its name complete or not at all, also after a power failure.

Content is written under a temporary name in the same folder and flushed to the disk. The rename is the last act, and the
folder that holds the new name is flushed after it. All renames of the package are made here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # a name that `temporary_path` made
FLUSH_SECONDS = 0.05  # between two flushes of what is being written
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes it
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


def rename_durably(source: Path, target: Path) -> None:
    """Give a file or folder another name on the same file system; the name reaches the disk, the content is as it was."""
    source.rename(target)
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


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


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing is in; one that another process uses again stays."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def flushing(folder: Path) -> Iterator[Callable[[], None]]:
    """Flush the files of a folder while the block writes them, so that little is left to flush. The block gets a function
    that flushes the rest: all is on the disk when it returns, and it raises OSError for what could not be written."""
    done, errors = threading.Event(), []

    def flush() -> None:
        while not done.wait(FLUSH_SECONDS):
            for parent, _, names in os.walk(folder):  # passes over folders that are gone
                for name in names:
                    try:
                        fsync_file(Path(parent, name))
                    except FileNotFoundError:  # a temporary name
                        continue
                    except OSError as error:  # the system tells it once, so the last flush may not see it
                        errors.append(error)

    def finish() -> None:
        done.set()
        thread.join()
        for error in errors:
            raise error
        fsync_tree(folder)

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield finish
    finally:
        done.set()
        thread.join()


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What libraries written in Rust raise when the system refuses to read or write `path` becomes an OSError."""
    from safetensors import SafetensorError  # here, so that a command which writes text does not load it

    try:
        yield
    except SafetensorError as error:
        number = SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def fsync_tree(folder: Path) -> None:
    """Flush every file of a folder to the disk, then its folders and itself."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_directory(path)
        else:
            fsync_file(path)
    fsync_directory(folder)


@contextmanager
def published_model(folder: Path) -> Iterator[Path]:
    """A folder to write a Hugging Face model, adapter or tokenizer into; its files appear in `folder` when the block ends.

    After an exception nothing has changed. Files that `folder` holds besides stay. The renames come last and config.json
    is the last of them; where a model has several files of weights it is absent until all are there, so that a kill between
    two renames leaves nothing that loads and is mixed.
    """
    temporary = temporary_path(folder / "model")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(source: Path, folder: Path) -> None:
    names = sorted((path.relative_to(source) for path in source.rglob("*") if path.is_file()), key=_publishing_order)
    for name in names:
        fsync_file(source / name)
    weights = [name for name in names if is_weights(name.name)]
    last_weights = weights[-1] if weights else None
    if weights:
        hide_model(folder, {name.name for name in weights})
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(folder / name)
        if name == last_weights:
            remove_other_weights(folder, {str(each) for each in names})
    for parent in {(folder / name).parent for name in names}:
        fsync_directory(parent)


CONFIG, WEIGHTS = "config.json", re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
INDEX_SUFFIX = ".index.json"


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of a whole model."""
    return WEIGHTS.fullmatch(name) is not None


def _publishing_order(name: Path) -> tuple[int, str]:
    last = {CONFIG: 3, "adapter_config.json": 3}
    rank = 0 if name.suffix in (".safetensors", ".bin") else 2 if name.name.endswith(INDEX_SUFFIX) else 1
    return last.get(name.name, rank), str(name)


def hide_model(folder: Path, weights: set[str]) -> None:
    """Before weights are replaced one by one: without config.json nothing loads them. One file is replaced at once."""
    present = {path.name for path in folder.glob("*") if is_weights(path.name)}
    if len(weights | present) > 1 and (folder / CONFIG).exists():
        (folder / CONFIG).unlink()
        fsync_directory(folder)


def remove_other_weights(folder: Path, names: set[str]) -> None:
    """Remove the weights and indices of a former model that are not among `names`."""
    for path in folder.glob("*"):
        index = path.name.startswith(("model.", "pytorch_model.")) and path.name.endswith(INDEX_SUFFIX)
        if (index or is_weights(path.name)) and path.name not in names:
            path.unlink()


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
