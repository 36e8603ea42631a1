"""Domain proportions in a file: the averages that a run with `mixer: doremi` leaves behind, or the tokens of a corpus; and
the proportions that a run starts with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dataflex_mega.json_text as json_text
from dataflex_mega.config.component_parameters import Spec
from dataflex_mega.config.dataflex_arguments import RunArguments
from dataflex_mega.data import manifest
from dataflex_mega.errors import ConfigError, did_you_mean

KEY = "init_mixture_proportions_file"


def is_manifest(path: str) -> bool:
    """Whether the file is the `manifest.json` of a corpus. Raises ConfigError when it cannot be read."""
    content = _load(path)
    return isinstance(content, dict) and content.get("format") == manifest.FORMAT


def corpus_proportions(path: str, names: Sequence[str]) -> list[float]:
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
        return json_text.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{KEY}: {path}, line {error.lineno}: {error.msg}") from error


def initial_proportions(
    arguments: RunArguments, mixer: Spec | None, sizes: Sequence[int], names: Sequence[str] | None = None
) -> tuple[float, ...]:
    """[k] numbers of samples -> [k] proportions before any update, sum 1.

    Raises ConfigError for another length, and when a file that has names has not these `names` in this order.
    """
    file = arguments.init_mixture_proportions_file
    if names is not None and file is not None:
        if arguments.init_mixture_proportions is None:
            return tuple(corpus_proportions(file, names))
        check_names(file, names)
    key, given = _configured_proportions(arguments, mixer)
    if given is None:
        equal = arguments.mixture_sample_rule in ("mixture", "uniform")
        equal = equal or (mixer is not None and arguments.mixture_sample_rule is None)
        given = [1.0] * len(sizes) if equal else [float(size) for size in sizes]
    if len(given) != len(sizes):
        raise ConfigError(f"{key}: {len(given)} numbers for {len(sizes)} datasets")
    total = math.fsum(given)
    return tuple(x / total for x in given)


def _configured_proportions(arguments: RunArguments, mixer: Spec | None) -> tuple[str, list[float] | None]:
    """(key, numbers) that the run starts with: init_mixture_proportions, else the mixer's own."""
    if arguments.init_mixture_proportions is not None:
        return "init_mixture_proportions", list(arguments.init_mixture_proportions)
    for key in ("proportions", "initial_proportions"):
        if (mixer or {}).get(key) is not None:
            return f"mixer.{key}", list((mixer or {})[key])
    return "init_mixture_proportions", None
