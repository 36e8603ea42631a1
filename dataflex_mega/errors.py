"""Exceptions, by who can correct the cause. A `UserError` ends the program with status 2 and one line."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from types import TracebackType

STOPPED = 128 + signal.SIGTERM  # the status of a run that left on request, whichever signal asked for it
MAX_CAUSE = 300  # characters of another exception's text in one of ours


class UserError(Exception):
    """A mistake in the configuration, the data or the command line. The message names the key, the row or the file."""


class ConfigError(UserError):
    """A key or a value of the configuration is wrong."""


class DataError(UserError):
    """A dataset is missing, empty or damaged. The message names the dataset, and the row where there is one."""


class CheckpointError(UserError):
    """A checkpoint is damaged or belongs to another run. The message names the file or the difference."""


class CodeError(ConfigError):
    """Code that the configuration names (a plug-in, a callback, a reward) has raised. The trace says where in it."""


class TrainingFault(RuntimeError):
    """Training cannot continue (a NaN loss, ranks that disagree). The message names the step and the samples."""

    is_consequence = False  # whether it began in another process


class NotFinite(TrainingFault):
    """A loss or a gradient is NaN or infinite; nothing was updated.

    `sample_ids`: the samples whose loss is not finite; empty when only the gradient is.
    """

    def __init__(self, message: str, sample_ids: list[int]) -> None:
        super().__init__(message)
        self.sample_ids = sample_ids


class Stopped(SystemExit):
    """The run left because a signal asked for it, with status 143. The line about it was logged.

    `agreed`: all ranks left after the same step.
    """

    def __init__(self, line: str = "", agreed: bool = False) -> None:
        super().__init__(STOPPED)
        self.line, self.agreed = line, agreed


class UserCall:
    """`with UserCall("selector my:Thing.score"): ...` around a call of code that is not the package's own.

    What it raises becomes a TrainingFault of one line with the original as its cause. A UserError and a TrainingFault say
    enough already, and an interrupt is nobody's fault; they pass.
    """

    def __init__(self, who: str) -> None:
        self.who = who

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (UserError, TrainingFault)):
            text = " ".join(str(error).split())
            text = text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]}..."
            cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
            raise TrainingFault(f"{self.who} raised {cause}{_raised_at(error)}") from error


def _raised_at(error: BaseException) -> str:
    """` (thing.py, line 12)`, where it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    return f" ({trace.tb_frame.f_code.co_filename.rpartition('/')[2]}, line {trace.tb_lineno})"


def did_you_mean(word: str, known: Iterable[str], count: int = 1) -> str:
    """` (did you mean 'x'?)` with at most `count` names, or an empty string when no known name is similar."""
    names = {name.lower(): name for name in known}
    similar = difflib.get_close_matches(word.lower(), names, n=count, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(names[s]) for s in similar)}?)" if similar else ""


# What code of the user's does not have to answer for.
PASSING = (UserError, TrainingFault, Stopped, KeyboardInterrupt, GeneratorExit)


class UserCode:
    """A block that runs code which the configuration names: `with UserCode("plugins: cannot import 'mine'"): ...`

    Whatever that code raises, sys.exit too, becomes a CodeError that begins with `where`. A UserError passes as it is, and
    so does an interrupt.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, PASSING):
            raise CodeError(f"{self.where}: {cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """What an exception says, on one line: `ValueError: no such thing`; the place of a syntax error, too."""
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({error.code!r})"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = " ".join(str(error).split())
    if isinstance(error, ImportError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
