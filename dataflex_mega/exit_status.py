"""The one place where exceptions end: an exit status, one line on standard error, and the trace in error.log.

Everything that is started as a program runs inside `exit_status`: `dataflex-cli` and its commands, `python -m
dataflex_mega.train`, the tools. From Python (`dm.train`) exceptions stay exceptions.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import fcntl
import os
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

from dataflex_mega.error_lines import ErrorLine, Place, chain, describe, is_user_code
from dataflex_mega.errors import ConfigError, Stopped
from dataflex_mega.log import get_logger, rank
from dataflex_mega.redaction import redact

ERROR_LOG = "error.log"
INTERRUPTED = 130  # 128 + SIGINT, as shells say it
WAIT_FOR_MAIN = 1.5  # seconds in which another rank lets the main one print a line that both have
WAIT_FOR_CAUSE = 3.0  # seconds in which a rank that lost another looks for what ended that one
PRINTED = -1  # in place of a rank: a line that was printed
TAIL = 1 << 18  # bytes of error.log in which lines of the same job are looked for


def exit_status(action: Callable[[], int], interrupted: str = "", place: Place | None = None) -> int:
    """What `action` returns; after an exception 2 where the user can mend it, 1 for a fault, 130 when it was interrupted.

    One line says what ended it. With several processes the main one prints it, or the one that failed alone.

    Args:
        interrupted: logged after an interrupt, where there is something to say.
        place: filled in by `action` when it knows where the run works; `error.log` goes there.
    """
    place = place or Place()
    with _tolerant_streams():
        try:
            status = action()
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            if interrupted:
                get_logger().info(interrupted)
            return INTERRUPTED
        except BrokenPipeError as error:
            if error.filename is None and not _stdout_works():  # `dataflex-cli components | head`
                return 0
            return report(error, place)
        except Stopped:
            raise
        except SystemExit as error:
            if place.folder is None or not is_user_code(error):
                raise
            return report(error, place)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if any(isinstance(link, KeyboardInterrupt) for link in chain(error)):
                return INTERRUPTED
            return report(error, place)


def report(error: BaseException, place: Place) -> int:
    """Print the line of an exception, keep its trace -> the exit status."""
    line = describe(error, place.paths)
    line = replace(line, text=redact(line.text))  # here, since it is written, printed and compared
    alike = line.status == 2 or place.folder is None or _world_size() == 1  # every rank finds a user's mistake
    if not line.keeps_trace and alike:
        get_logger().error("error: %s", line.text, extra={"all_ranks": line.status == 1})
        return line.status
    text = redact("".join(traceback.format_exception(error)))
    file = _keep_trace(line, text, place.folder)
    board = None if file is None or place.folder is None else _Board(file, line)
    heard = "" if file is None else f" (trace in {file})"
    if _world_size() == 1 or board is None:
        get_logger().error("error: %s%s", line.text, heard, extra={"all_ranks": line.status == 1 and file is None})
    else:
        board.print_once(heard)
    if file is None:
        print(text, file=sys.stderr)  # nowhere else to keep it
    return line.status


# -- error.log ---------------------------------------------------------------------------------------------------------


def _keep_trace(line: ErrorLine, trace: str, folder: Path | None) -> Path | None:
    """Append the trace to error.log in the run's folder, else in one for temporary files -> the file; None if neither
    can be written."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    entry = f"{_mark(rank())}{now}, rank {rank()} of {_world_size()}, error: {line.text}\n{trace}\n"
    own = Path(tempfile.gettempdir()) / f"dataflex_mega-{os.getpid()}"
    for place in (folder, own):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with (place / ERROR_LOG).open("a", encoding="utf-8", errors="backslashreplace") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                stream.write(entry)
            return place / ERROR_LOG
    return None


def _job() -> str:
    """What the processes of one start on this machine have in common."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    return "/".join([str(os.getppid()), *(os.environ.get(name, "") for name in names)])


def _mark(number: int) -> str:
    return f"=== [{_job()}] rank {number}: "


def _world_size() -> int:
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdecimal() else 1


@dataclass(frozen=True)
class _Board:
    """error.log as the place where the processes of a job see each other's lines."""

    file: Path
    line: ErrorLine

    def print_once(self, heard: str) -> None:
        """Print this process's line, unless another of the job has the same; the first cause rather than what followed."""
        own = self.line.text
        if self.line.is_consequence:
            cause = self._wait(lambda lines: next((t for _, t in lines if not _follows(t)), None), WAIT_FOR_CAUSE)
            if rank() == 0:
                self._print(cause or own, heard)
            elif cause is None and not self._lines_of(0):
                self._print(own, heard)
        else:
            patience = WAIT_FOR_CAUSE if self.line.is_about_peer else WAIT_FOR_MAIN
            if rank() == 0 or self._wait(self._main_covers, patience) is None:
                self._print(own, heard)

    def _print(self, text: str, heard: str) -> None:
        """Print a line, and put on the board that it is printed; nothing where it was."""
        with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if text in self._lines_of(PRINTED):
                return
            stream.write(f"{_mark(PRINTED)}error: {text}\n")
        get_logger().error("error: %s%s", text, heard, extra={"all_ranks": True})

    def _main_covers(self, _: list[tuple[int, str]]) -> str | None:
        """What the main process has that makes ours be printed by it: the same, that it has lost us, or, where ours is about
        another process, any."""
        us = f"rank {rank()}"
        lines = self._lines_of(0)
        if self.line.is_about_peer:
            return next(iter(lines), None)
        return next((text for text in lines if text == self.line.text or _follows(text) or text.startswith(us)), None)

    def _wait(self, look: Callable[[list[tuple[int, str]]], str | None], seconds: float) -> str | None:
        end = time.monotonic() + seconds
        while True:
            found = look(self._lines())
            if found is not None or time.monotonic() >= end:
                return found
            time.sleep(0.05)

    def _lines_of(self, number: int) -> list[str]:
        return [text for one, text in self._lines() if one == number]

    def _lines(self) -> list[tuple[int, str]]:
        """(rank, line) of the processes of this job."""
        with contextlib.suppress(OSError):
            with self.file.open("rb") as stream:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL))
                content = stream.read().decode(errors="replace")
            mark = f"=== [{_job()}] rank "
            entries = [row.removeprefix(mark) for row in content.splitlines() if row.startswith(mark)]
            return [(int(row.partition(":")[0]), row.partition("error: ")[2]) for row in entries]
        return []


def _follows(text: str) -> bool:
    return text.startswith("torch.distributed: another process")


# -- streams -----------------------------------------------------------------------------------------------------------


class TolerantStream:
    """A text stream for which nobody may be listening any more: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # a closed pipe, a full disk behind `2>`; a closed stream
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _tolerant_streams() -> Iterator[None]:
    """Standard error as a TolerantStream, and no closed standard streams: a file of the run would get their number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    stream: Any = sys.stderr
    if stream is None:
        stream = open(os.devnull, "w")  # noqa: SIM115, PTH123  # for the rest of the program
    with contextlib.ExitStack() as stack:
        if not isinstance(stream, TolerantStream):
            stack.enter_context(contextlib.redirect_stderr(TolerantStream(stream)))  # type: ignore[type-var]
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(open(os.devnull, "w")))  # noqa: SIM115, PTH123
        yield


def _stdout_works() -> bool:
    """Whether somebody reads what is printed. Where nobody does, the rest of it is dropped, also at exit."""
    with contextlib.suppress(OSError, ValueError):
        number = sys.stdout.fileno()
        poll = select.poll()
        poll.register(number, 0)
        if poll.poll(0):  # no reader
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            return False
    return True


# -- command lines -----------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose refusals are one line, a ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.prog} --help says more")
