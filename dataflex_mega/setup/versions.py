"""Requirement lines and version numbers, as far as this package needs them. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from dataflex_mega.errors import UserError

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


class SetupError(UserError):
    """A step of an installation failed; the message is shown to the user."""


class Requirement(NamedTuple):
    """A line of a package's metadata, like `peft<=0.18.1,>=0.18; extra == "x"`."""

    name: str  # normalised
    bounds: str  # `<=0.18.1,>=0.18`, or empty
    extra: str  # the extra that it belongs to, or empty

    @property
    def text(self) -> str:
        """The line without its extra, as pip takes it."""
        return self.name + self.bounds


def requirement_name(requirement: str) -> str:
    """`PyYAML>=6 ; python_version < "4"` -> `pyyaml`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise SetupError(f"{requirement!r} is not a requirement")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def read_requirement(line: str) -> Requirement:
    """The parts of a requirement line. Raises SetupError for one without a name."""
    requirement, _, marker = line.partition(";")
    name = requirement_name(requirement.strip())
    extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", marker)
    bounds = re.search(r"[<>=!~].*", requirement)
    text = re.sub(r"[\s()]", "", bounds.group()) if bounds else ""
    return Requirement(name, text, extra.group(1) if extra else "")


def parse_release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with, without trailing zeros: `2.13.0+cpu` -> (2, 13)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def version_fits(version: str, bounds: str) -> bool:
    """Whether a version is inside bounds like `>=0.9.5,<0.10`; pre-releases count as their release."""
    conditions = re.findall(r"(>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)", bounds)
    return all(COMPARE[sign](parse_release(version), parse_release(bound)) for sign, bound in conditions)
