"""Files of the offline tools that belong to other data than the run's are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

from dataflex_mega.data.pool import SamplePool
from dataflex_mega.errors import DataError
from dataflex_mega.run.roles import RunRoles

PATHS = ("indices_path", "probs_path")  # parameters of selectors that name a file of an offline tool


def check_files(roles: RunRoles, pool: SamplePool) -> None:
    """Raises DataError when a selector reads a file of an offline tool that was computed from other data than the run's.

    What DataFlex wrote has no note beside it, and is taken as it is.
    """
    for key in PATHS:
        given = getattr(roles.algorithms.selector, key, None)
        note = Path(f"{given}.json").expanduser()
        if not isinstance(given, str) or not note.is_file():
            continue
        try:
            identity = json.loads(note.read_text())["identity"]["candidates"]
            recorded = identity.get("data", {}).get("pool")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(f"{note}: cannot be read: {error}") from error
        present = pool.content_hash()
        if recorded is not None and list(recorded.items()) != list(present.items()):
            names = [name for name in {**recorded, **present} if recorded.get(name) != present.get(name)]
            found = ", ".join(f"{n} ({recorded.get(n)} there, {present.get(n)} here)" for n in names or ["their order"])
            name = roles.specs["selector"]["name"]
            raise DataError(f"selector.{name}.{key}: {given} was computed from other data: {found}")
