"""Exceptions, by who can correct the cause. A `UserError` ends the program with status 2 and one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the configuration, the data or the command line. The message names the key, the row or the file."""


class ConfigError(UserError):
    """A key or a value of the configuration is wrong."""


class DataError(UserError):
    """A dataset is missing, empty or damaged. The message names the dataset, and the row where there is one."""


class CheckpointError(UserError):
    """A checkpoint is damaged or belongs to another run. The message names the file or the difference."""


class TrainingFault(RuntimeError):
    """Training cannot continue (a NaN loss, ranks that disagree). The message names the step and the samples."""


class NotFinite(TrainingFault):
    """A loss or a gradient is NaN or infinite; nothing was updated.

    `sample_ids`: the samples whose loss is not finite; empty when only the gradient is.
    """

    def __init__(self, message: str, sample_ids: list[int]) -> None:
        super().__init__(message)
        self.sample_ids = sample_ids


def did_you_mean(word: str, known: Iterable[str], count: int = 1) -> str:
    """` (did you mean 'x'?)` with at most `count` names, or an empty string when no known name is similar."""
    names = {name.lower(): name for name in known}
    similar = difflib.get_close_matches(word.lower(), names, n=count, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(names[s]) for s in similar)}?)" if similar else ""
