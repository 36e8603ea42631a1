"""Run an action on one or on every process and raise its error on all of them, so that none waits for another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.errors import CheckpointError, UserError
from dataflex_mega.locks import FolderLock

T = TypeVar("T")
WAIT_SECONDS = 1.0  # between two looks at a lock that another job holds


def run_on_main(collectives: Collectives, action: Callable[[], T]) -> T:
    """The main process's result of `action`, on every process. An OSError is raised on all of them, a UserError as a
    CheckpointError."""
    value, error = None, None
    if collectives.parallel_info.is_main:
        try:
            value = action()
        except (UserError, OSError) as raised:
            error = _plain(raised)
    value, error = collectives.broadcast_object((value, error))
    if error is not None:
        raise _error(error)
    return value


def run_and_agree(collectives: Collectives, action: Callable[[], T]) -> T:
    """This process's own result of `action`. Raises CheckpointError on every process when one of them raises it, or an
    OSError."""
    value, error = None, None
    try:
        value = action()
    except (CheckpointError, OSError) as raised:
        error = _plain(raised)
    errors = [one for one in collectives.all_gather_objects(error) if one is not None]
    if errors:
        raise _error(errors[0])
    return cast("T", value)


def _plain(error: Exception) -> str | tuple[Any, ...]:
    """What other processes need to raise an error: its message; of the system's its number, words and file."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror, None if error.filename is None else str(error.filename)
    return str(error)


def _error(plain: str | tuple[Any, ...]) -> Exception:
    return CheckpointError(plain) if isinstance(plain, str) else OSError(*plain)


@contextmanager
def waited_lock(collectives: Collectives, lock: FolderLock, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder's lock for a block that all processes run; the main one holds it. While another job does, wait, and
    `report` once who that is."""
    waited = False
    while (holder := run_on_main(collectives, lock.try_acquire)) is not None:
        if not waited:
            report(f"waiting for {lock.folder}, held by {holder}")
            waited = True
        time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()
