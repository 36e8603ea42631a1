"""Values against annotations: does `4` fit `int | None`, and if not, what would.

Annotations are text, because LLaMA-Factory's arrive as text and a dataclass under `from __future__ import annotations`
holds text too. Two strictnesses: our own keys must fit; LLaMA-Factory's are only checked where a wrong value is beyond
doubt (a number, a truth value, one of a few words), since what else a key takes is its own business.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from dataflex_mega.errors import ConfigError, did_you_mean

PLAIN = ("bool", "int", "float", "str", "dict")
WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "dict": "a mapping",
    "any": "anything",
    "none": "nothing",
}


@dataclass(frozen=True)
class Kind:
    """One alternative of an annotation."""

    name: str  # of WORDS, "list" or "choice"
    item: tuple[Kind, ...] = ()  # alternatives for the items of a list
    choices: tuple[Any, ...] = ()  # of a Literal


class MismatchError(Exception):
    """A value fits no alternative."""


@cache
def kinds(annotation: str) -> tuple[Kind, ...]:
    """`"Literal['a', 'b'] | None"` -> its alternatives. A class that is not known here is a Kind "any"."""
    return tuple(_read(ast.parse(annotation, mode="eval").body))


def _read(node: ast.expr) -> list[Kind]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_read(node.left), *_read(node.right)]
    if isinstance(node, ast.Subscript):
        return _read_subscript(node)
    if isinstance(node, ast.Constant) and node.value is None:
        return [Kind("none")]
    name = _last_name(node)
    if name == "NoneType":
        return [Kind("none")]
    if name == "list":
        return [Kind("list", item=(Kind("any"),))]
    return [Kind(name if name in PLAIN else "any")]


def _read_subscript(node: ast.Subscript) -> list[Kind]:
    outer = _last_name(node.value)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if outer == "Literal":
        return [Kind("choice", choices=tuple(ast.literal_eval(item) for item in inner))]
    if outer in ("Optional", "Union"):
        found = [kind for item in inner for kind in _read(item)]
        return [*found, Kind("none")] if outer == "Optional" else found
    if outer in ("list", "tuple"):
        return [Kind("list", item=tuple(_read(inner[0])))]
    return [Kind("dict" if outer == "dict" else "any")]


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def fit(key: str, value: Any, annotation: str) -> Any:
    """A value of one of our keys, as its annotation wants it. Raises ConfigError naming the key."""
    try:
        return _fit_any(value, kinds(annotation))
    except MismatchError:
        raise ConfigError(f"{key}: {_expected(value, kinds(annotation))}") from None


def fit_loosely(key: str, value: Any, annotation: str) -> Any:
    """A value of one of LLaMA-Factory's keys. Raises ConfigError where it cannot be meant: text for a number, text for a
    truth value, 1.5 for a whole number, a word that is not one of the allowed. Numbers written as text become numbers."""
    found = kinds(annotation)
    if value is None and any(kind.name in ("str", "any", "list") for kind in found):
        return value
    try:
        return _fit_any(value, found)
    except MismatchError:
        pass
    names = {kind.name for kind in found}
    if isinstance(value, int) and value in (0, 1) and names <= {"bool", "none"}:
        return bool(value)
    if "str" in names:
        plain_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if plain_number else value  # `run_name: 2024`; a list stands for comma-separated text
    raise ConfigError(f"{key}: {_expected(value, found)}")


def _fit_any(value: Any, alternatives: tuple[Kind, ...]) -> Any:
    for kind in sorted(alternatives, key=lambda k: k.name == "any"):
        try:
            return _fit(value, kind)
        except MismatchError:
            continue
    raise MismatchError


def _fit(value: Any, kind: Kind) -> Any:
    if kind.name == "list":
        return _fit_list(value, kind)
    if kind.name in ("int", "float"):
        return _fit_number(value, kind.name)
    fits = {
        "any": lambda: True,
        "none": lambda: value is None,
        "bool": lambda: isinstance(value, bool),
        "str": lambda: isinstance(value, str),
        "dict": lambda: isinstance(value, Mapping),
        "choice": lambda: any(value == choice and type(value) is type(choice) for choice in kind.choices),
    }
    if not fits[kind.name]():
        raise MismatchError
    return value


def _fit_number(value: Any, name: str) -> int | float:
    """A number stays what it is, but 100.0 for an int becomes 100 and "1e-3" becomes 0.001. NaN is no number."""
    if isinstance(value, str):
        try:
            value = float(value) if any(c in value.lower() for c in ".en") else int(value)
        except ValueError:
            raise MismatchError from None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise MismatchError
    if name == "int" and isinstance(value, float):
        if not value.is_integer():
            raise MismatchError
        return int(value)
    return value


def _fit_list(value: Any, kind: Kind) -> list[Any]:
    """Lists, and `a,b` as LLaMA-Factory writes lists."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise MismatchError
    return [_fit_any(item, kind.item) for item in value]


def describe(alternatives: tuple[Kind, ...]) -> str:
    """`a number, or nothing`."""
    return ", or ".join(_words(kind) for kind in alternatives)


def _words(kind: Kind) -> str:
    if kind.name == "choice":
        return "one of " + ", ".join(str(choice) for choice in kind.choices)
    if kind.name == "list":
        return f"a list of {describe(kind.item)}" if kind.item[0].name != "any" else "a list"
    return WORDS[kind.name]


def _expected(value: Any, alternatives: tuple[Kind, ...]) -> str:
    """`expected a number, found 'fast'`, with the nearest word where words are expected."""
    found = "nothing" if value is None else repr(value)
    choices = [c for kind in alternatives for c in kind.choices if isinstance(c, str)]
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"expected {describe(alternatives)}, found {found}{near}"
