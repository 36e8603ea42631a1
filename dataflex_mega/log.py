"""The package's logger: lines for people, on standard error, from the main rank only.

`get_logger()` sets the logger `dataflex_mega` up at its first call, as transformers does with its own: level INFO, one
handler, plain messages, no propagation to the root logger (libraries that configure it would print every line twice).
A program that wants these lines elsewhere replaces the handler. Secrets are replaced by *** in every line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import TextIO

from dataflex_mega.redaction import redact

NAME = "dataflex_mega"
LIBRARIES = ("", "transformers", "datasets", "huggingface_hub", "accelerate", "peft", "llamafactory", "urllib3")
ALL_RANKS = {"all_ranks": True}  # `logger.error(..., extra=ALL_RANKS)`: a line that every rank writes


def rank() -> int:
    """The number that torchrun gave this process; 0 without torchrun."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0  # config.environment refuses what is no number


def is_main() -> bool:
    """Whether this process is rank 0, or alone."""
    return rank() == 0


class RankFilter(logging.Filter):
    """Drops what other ranks than the main one log, unless it is marked with ALL_RANKS."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_main() or getattr(record, "all_ranks", False)


class SecretFilter(logging.Filter):
    """Replaces tokens, keys and passwords in what is logged, and in the trace of an exception."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        hidden = redact(text)
        if hidden != text:
            record.msg, record.args = hidden, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


class RankFormatter(logging.Formatter):
    """The plain message; `[rank 3] ` in front where another rank than the main one writes it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if is_main() else f"[rank {rank()}] {text}"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is when a line is logged: a progress bar replaces it while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def guard_libraries() -> None:
    """Put the filter for secrets on the handlers of the libraries that name files and addresses in what they log."""
    for name in LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(existing, SecretFilter) for existing in handler.filters):
                handler.addFilter(SecretFilter())


def log_notes(notes: Iterable[str]) -> None:
    """Write what the user should know of a configuration, a line each."""
    for note in notes:
        get_logger().info("note: %s", note)


@cache
def get_logger() -> logging.Logger:
    """The logger `dataflex_mega`; sets it up at the first call, unless the program has given it a handler before."""
    logger = logging.getLogger(NAME)
    logger.addFilter(SecretFilter())  # of the logger, so that it stays when a program replaces the handler
    if not logger.handlers:
        handler = StderrHandler()
        handler.setFormatter(RankFormatter("%(message)s"))
        handler.addFilter(RankFilter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger
