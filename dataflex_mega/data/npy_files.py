"""Arrays in .npy files of users and tools: read without unpickling, and refused in one line."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.errors import DataError, UserError

# What numpy raises for a header that is cut, no literal, nested deeply or says more than the file holds.
DAMAGE = (OSError, ValueError, EOFError, TypeError, KeyError, SyntaxError, OverflowError, RecursionError, MemoryError)


def map_array(path: Path, mode: Any = "r", what: str = "", error: type[UserError] = DataError) -> np.ndarray:
    """The array of a .npy file, memory-mapped, so that a header cannot ask for memory.

    Args:
        what: what the message begins with.
        error: the class of the error.

    Raises:
        UserError: of that class, for a file that is missing, damaged, in another format or of Python objects.
    """
    where = f"{what}: {path}" if what else str(path)
    try:
        values: Any = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (*DAMAGE, tokenize.TokenError) as cause:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        hint = "; Python objects are not read" if "bject" in lines[0] or "pickle" in lines[0] else ""
        raise error(f"{where} cannot be read as a .npy array: {lines[0][:160]}{hint}") from cause
    if not isinstance(values, np.ndarray):
        raise error(f"{where} cannot be read as a .npy array: it is an archive of several")
    return values
