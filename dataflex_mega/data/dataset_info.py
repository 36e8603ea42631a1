"""`dataset_info.json`, which describes LLaMA-Factory's data sets: read and checked before LLaMA-Factory reads it.

LLaMA-Factory itself looks at what it needs and ignores the rest, so a misspelt `columns` would read other columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dataflex_mega.json_text as json_text
from dataflex_mega.errors import DataError, did_you_mean

NAME = "dataset_info.json"
SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
FORMATS = ("alpaca", "sharegpt", "openai")
KEYS = (*SOURCES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags")
COLUMNS = (
    "prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "chosen",
    "rejected", "kto_tag",
)  # fmt: skip
TAGS = (
    "role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"
)  # fmt: skip


def read(folder: Path, key: str = "dataset_dir") -> dict[str, Any]:
    """Name -> entry, as written. Raises DataError naming the file, and `key` where it is not there."""
    file = folder / NAME
    if not folder.is_dir():
        what = "is a file, expected a folder with dataset_info.json" if folder.exists() else "not found"
        raise DataError(f"{key}: {file} not found: {folder} {what}")
    try:
        content = json_text.read(file)
    except FileNotFoundError:
        raise DataError(f"{key}: {file} not found") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file}{json_text.read_problem(file, error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object of name: entry, found a {type(content).__name__}")
    return content


def check_entry(name: str, entry: Any, where: str) -> None:
    """Raises DataError for an entry that LLaMA-Factory would fail on, or read otherwise than it is meant."""
    place = f"dataset {name!r}: {where}"
    if not isinstance(entry, Mapping):
        raise DataError(f'{place}: expected an entry such as {{"file_name": "rows.jsonl"}}, found {_short(entry)}')
    _check_names(place, entry, KEYS, "")
    sources = [source for source in SOURCES if source in entry]
    if not sources:
        found = ", ".join(map(str, entry)) or "nothing"
        raise DataError(f"{place}: the entry has none of {', '.join(SOURCES)}; it has {found}")
    for source in sources:
        if not isinstance(entry[source], str) or not entry[source].strip():
            raise DataError(f"{place}: {source} must be text, found {_short(entry[source])}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATS:
        near = did_you_mean(str(formatting), FORMATS)
        raise DataError(f"{place}: formatting must be one of {', '.join(FORMATS)}, found {_short(formatting)}{near}")
    for part, known in (("columns", COLUMNS), ("tags", TAGS)):
        _check_words(f"{place}: {part}", entry.get(part, {}), known)
    number = entry.get("num_samples")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise DataError(f"{place}: num_samples must be a whole number >= 1, found {_short(number)}")
    for key in ("subset", "split", "folder"):
        if not isinstance(entry.get(key), str | None):
            raise DataError(f"{place}: {key} must be text, found {_short(entry[key])}")
    if not isinstance(entry.get("ranking", False), bool):
        raise DataError(f"{place}: ranking must be true or false, found {_short(entry['ranking'])}")


def _check_words(place: str, words: Any, known: tuple[str, ...]) -> None:
    """A mapping of text to text."""
    if not isinstance(words, Mapping):
        raise DataError(f"{place} must be a mapping such as {{{known[0]!r}: ...}}, found {_short(words)}")
    _check_names(place, words, known, ".")
    for key, value in words.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{place}.{key} must be text, found {_short(value)}")


def _check_names(place: str, given: Mapping[str, Any], known: tuple[str, ...], dot: str) -> None:
    """Names that are nearly known ones are misspelt; others are notes of the user's, as LLaMA-Factory takes them."""
    for key in given:
        near = did_you_mean(str(key), known)
        if key not in known and near:
            raise DataError(f"{place}{dot or ': '}{key}: unknown key{near}")


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
