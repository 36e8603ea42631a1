"""JSON that users wrote, parsed without trusting it.

`json.loads` answers deep nesting with a RecursionError or, deeper still, with a crash of the process, and a number of
thousands of digits with a ValueError of its own kind. Here both are a JSONDecodeError, with the place.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dataflex_mega.errors import did_you_mean

DEEPEST = 200  # levels; configurations, data set descriptions and chat rows have fewer than ten
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def loads(text: str, **options: Any) -> Any:
    """What `json.loads` returns, options the same. Raises JSONDecodeError for everything that is wrong with the text."""
    check_depth(text)
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError) or "digits" in str(error):
            raise json.JSONDecodeError(str(error).partition(";")[0], text, 0) from error
        raise


def read(path: Path, **options: Any) -> Any:
    """A file's content. Raises OSError, UnicodeDecodeError and JSONDecodeError."""
    return loads(path.read_text(encoding="utf-8"), **options)


def check_depth(text: str, deepest: int = DEEPEST) -> None:
    """Raises JSONDecodeError where brackets lie in one another more than `deepest` times. Linear in the text."""
    if text.count("[") + text.count("{") <= deepest:
        return
    depth = 0
    for found in _TOKENS.finditer(text):
        token = found.group()
        if token in "[{":
            depth += 1
            if depth > deepest:
                raise json.JSONDecodeError(f"nested more than {deepest} levels deep", text, found.start())
        elif token in "]}":
            depth -= 1


def read_problem(path: Path, error: OSError | ValueError) -> str:
    """Why a JSON file cannot be read, after the path: `, line 3: not JSON: ...`, ` not found`, ` cannot be read: ...`."""
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno}: not JSON: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f": not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})"
    if isinstance(error, FileNotFoundError):
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        return f" not found{did_you_mean(path.name, near)}"
    return f" cannot be read: {getattr(error, 'strerror', None) or error}"
