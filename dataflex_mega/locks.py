"""Locks between processes, so that a folder has one writer: a file locked by flock, which says who holds it.

The system gives a lock up when its process ends, however that happens, so a file that a dead process left behind blocks
nobody. Its content is for people; the lock decides. It is removed when the lock is released.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from dataflex_mega.errors import UserError
from dataflex_mega.files import remove_leftovers
from dataflex_mega.log import get_logger

LOCK_FILE = ".dataflex_mega.lock"  # hidden, in the locked folder
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_open_streams: weakref.WeakSet[IO[str]] = weakref.WeakSet()


class Held(UserError):
    """A folder is locked by another process. The message names it."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        """The program and its first argument; later ones may hold what is secret."""
        words = [Path(sys.argv[0]).name, *sys.argv[1:2]] if sys.argv else ["python"]
        command = " ".join(word for word in words if "=" not in word)
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"), command[:200])

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """What a lock file says; None when that cannot be read."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"


class FolderLock:
    """The lock of one folder, which is created when it is not there. Free until `try_acquire` returns None."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self._stream: IO[str] | None = None

    def try_acquire(self) -> str | None:
        """None when this process holds the lock now, otherwise who does. Raises OSError when the folder is not writable.

        With the lock come the leftovers of writers that were killed: their temporary files are removed. Where the file
        system has no locks, a line says so and the folder is used without one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._stream is None:
            stream = self.path.open("a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                holder = Holder.parse(stream.read())
                stream.close()
                return str(holder or "another process")
            except OSError as error:
                stream.close()
                if error.errno not in UNSUPPORTED:
                    raise
                self.path.unlink(missing_ok=True)
                get_logger().info(
                    "note: %s: this file system has no locks; only one process may write there", self.folder
                )
                return None
            if self._is_current(stream):
                self._keep(stream)
            else:  # its last holder has removed the file meanwhile
                stream.close()
        return None

    def _is_current(self, stream: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(stream.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _keep(self, stream: IO[str]) -> None:
        self._stream = stream
        _open_streams.add(stream)
        stream.truncate(0)
        stream.write(json.dumps(asdict(Holder.this_process())))
        stream.flush()
        remove_leftovers(self.folder)

    def release(self) -> None:
        """Give the lock up and remove its file. A lock that is not held stays so."""
        if self._stream is not None:
            self.path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None


@contextmanager
def locked(folder: Path, message: str) -> Iterator[None]:
    """Hold a folder's lock for a block. `message`: what to say when another process does, with `{holder}` in it.

    Raises Held with that message.
    """
    lock = FolderLock(folder)
    holder = lock.try_acquire()
    if holder is not None:
        raise Held(message.replace("{holder}", holder))
    try:
        yield
    finally:
        lock.release()


def _close_in_child() -> None:
    """A child that was forked must not keep a lock beyond the life of this process."""
    for stream in list(_open_streams):
        stream.close()


os.register_at_fork(after_in_child=_close_in_child)
