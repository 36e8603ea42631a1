"""Domain proportions in a file: the averages that a run with `mixer: doremi` leaves behind, or the tokens of a corpus; and
the limits of proportions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.data import manifest
from dataflex_mega.errors import ConfigError, did_you_mean

KEY = "init_mixture_proportions_file"


def is_manifest(path: str) -> bool:
    """Whether the file is the `manifest.json` of a corpus. Raises ConfigError when it cannot be read."""
    content = _load(path)
    return isinstance(content, dict) and content.get("format") == manifest.FORMAT


def natural(path: str, names: Sequence[str]) -> list[float]:
    """The natural proportions of the domains `names` of a corpus: their tokens over the tokens of all of them.

    `path` is its manifest. Raises ConfigError for a domain it does not have.
    """
    tokens = {domain["name"]: int(domain["tokens"]) for domain in _load(path)["domains"]}
    for name in names:
        if name not in tokens:
            hint = did_you_mean(name, tokens) or f"; it has {', '.join(tokens)}"
            raise ConfigError(f"{KEY}: {path} has no domain {name!r}{hint}")
    total = sum(tokens[name] for name in names)
    return [tokens[name] / total for name in names]


def read(path: str) -> list[float]:
    """The numbers of a .json file's `average_weights`, or a list of numbers in brackets or between commas and spaces.

    Raises ConfigError naming the file.
    """
    content = _load(path)
    numbers = content.get("average_weights") if isinstance(content, dict) else content
    if not isinstance(numbers, list) or not numbers or any(type(x) not in (int, float) for x in numbers):
        raise ConfigError(f"{KEY}: {path}: expected average_weights or a list of numbers, found {str(content)[:80]!r}")
    if min(numbers) < 0 or not 0 < sum(numbers) < float("inf"):
        raise ConfigError(f"{KEY}: {path}: expected numbers that are finite, >= 0 and not all 0, found {numbers}")
    return [float(x) for x in numbers]


def check_names(path: str, names: Sequence[str]) -> None:
    """Raises ConfigError when the file names its domains and they are not these in this order."""
    content = _load(path)
    theirs = content.get("domain_names") if isinstance(content, dict) else None
    if theirs is not None and list(theirs) != list(names):
        raise ConfigError(f"{KEY}: {path} is for {', '.join(map(str, theirs))}; dataset is {', '.join(names)}")


def _load(path: str) -> Any:
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{KEY}: {path} cannot be read: {reason}") from error
    if text.strip()[:1] not in ("{", "["):
        text = f"[{','.join(text.replace(',', ' ').split())}]"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{KEY}: {path}, line {error.lineno}: {error.msg}") from error


def check_limit(key: str, value: float | Sequence[float] | None, most: float) -> None:
    """Raises ConfigError unless it is nothing or numbers in 0..most; epochs are above 0."""
    given = [] if value is None else [value] if isinstance(value, int | float) else list(value)
    least_text = "> 0" if key == "max_epochs" else "in 0..1"
    for x in given:
        if not math.isfinite(x) or x > most or x < 0 or (key == "max_epochs" and x == 0):
            raise ConfigError(f"{key}: must be {least_text}, found {x:g}")
    if isinstance(value, list) and not value:
        raise ConfigError(f"{key}: expected a number, or one for each dataset, found []")
