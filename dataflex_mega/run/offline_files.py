"""Files of the offline tools that belong to other data than the run's are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_mega.errors import DataError

if TYPE_CHECKING:
    from dataflex_mega.run.build import Opened

PATHS = ("indices_path", "probs_path")  # parameters of selectors that name a file of an offline tool


def check_files(run: Opened) -> None:
    """Raises DataError when a selector reads a file of an offline tool that was made of other data than the run's.

    What DataFlex wrote has no note beside it, and is taken as it is.
    """
    for key in PATHS:
        given = getattr(run.roles.selector, key, None)
        note = Path(f"{given}.json").expanduser()
        if not isinstance(given, str) or not note.is_file():
            continue
        try:
            theirs = json.loads(note.read_text())["identity"]["candidates"]
            pool = theirs.get("data", {}).get("pool")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(f"{note}: cannot be read: {error}") from error
        mine = run.pool.content_hash()
        if pool is not None and list(pool.items()) != list(mine.items()):
            names = [name for name in {**pool, **mine} if pool.get(name) != mine.get(name)] or ["their order"]
            found = ", ".join(f"{name} ({pool.get(name)} there, {mine.get(name)} here)" for name in names)
            raise DataError(f"selector.{run.specs['selector']['name']}.{key}: {given} was made of other data: {found}")
