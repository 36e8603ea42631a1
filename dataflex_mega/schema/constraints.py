"""What a field allows beyond its type, declared in its annotation: `alpha: Annotated[float, Range(ge=0, lt=1)] = 0.9`.

A field may hold nothing (None) where its type says so; a constraint is about what it holds otherwise. `check_fields` runs
when an object is made from Python, `coercion.coerce` when a configuration is read: the same declaration, the same message.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Protocol, runtime_checkable

from dataflex_mega.errors import ConfigError


@runtime_checkable
class Constraint(Protocol):
    """Metadata of `Annotated` that can refuse a value. `str` of it is the rule: `>= 0 and < 1`."""

    def error(self, value: Any) -> str | None:
        """`must be >= 0 and < 1, found 3`, or None for a value that is allowed."""
        ...


@dataclass(frozen=True)
class Range:
    """A number, or every number of a list, between bounds; finite in any case. Bounds are named as in Pydantic.

    Args:
        gt: greater than.
        ge: greater than or equal to.
        lt: less than.
        le: less than or equal to.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __str__(self) -> str:
        signs = {">": self.gt, ">=": self.ge, "<": self.lt, "<=": self.le}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in signs.items() if bound is not None) or "finite"

    def __contains__(self, number: float) -> bool:
        if not _is_finite(number):
            return False
        above = (self.gt is None or number > self.gt) and (self.ge is None or number >= self.ge)
        return above and (self.lt is None or number < self.lt) and (self.le is None or number <= self.le)

    def error(self, value: Any) -> str | None:
        """What is no number is left to the type."""
        for number in _numbers(value):
            if number not in self:
                open_ended = (self.gt is None and self.ge is None) or (self.lt is None and self.le is None)
                finite = "finite and " if not _is_finite(number) and open_ended and str(self) != "finite" else ""
                return f"must be {finite}{self}, found {str(number).removesuffix('.0')}"
        return None


@dataclass(frozen=True)
class RelativeWeights:
    """A list of numbers that count relative to their sum, such as domain proportions."""

    def __str__(self) -> str:
        return "finite, >= 0 and not all 0"

    def error(self, value: Any) -> str | None:
        if value is None:
            return None
        numbers = list(_numbers(value))
        if not all(math.isfinite(x) and x >= 0 for x in numbers) or sum(numbers) <= 0:
            return f"must be {self}, found {value}"
        return None


@dataclass(frozen=True)
class NotEmpty:
    """A list with at least one item."""

    def __str__(self) -> str:
        return "at least one"

    def error(self, value: Any) -> str | None:
        return None if value is None or len(value) > 0 else f"must have {self}, found {value}"


@dataclass(frozen=True)
class Distinct:
    """A list that is not empty and has no item twice."""

    def __str__(self) -> str:
        return "at least one, none twice"

    def error(self, value: Any) -> str | None:
        if value is None or (len(value) > 0 and len(set(value)) == len(value)):
            return None
        return f"must be {self}, found {value}"


def _is_finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)  # an int may be too large for a float


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def constraints_of(hint: Any) -> tuple[Constraint, ...]:
    """The constraints of an annotation; none unless it is `Annotated`."""
    if typing.get_origin(hint) is not Annotated:
        return ()
    return tuple(item for item in hint.__metadata__ if isinstance(item, Constraint))


@cache
def field_hints(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, `Annotated` included, by name. Raises NameError for one that cannot be
    resolved at run time."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def check_fields(instance: Any, prefix: str = "") -> None:
    """Raises ConfigError `<prefix><field>: must be ...` for a field of a dataclass whose value its annotation refuses.

    A field is named as in the configuration, by its metadata `name` where it has one.

    A class with an annotation that cannot be resolved declares nothing; reading a configuration for it is an error.
    """
    try:
        hints = field_hints(type(instance))
    except NameError:
        return
    for field in dataclasses.fields(instance):
        for constraint in constraints_of(hints[field.name]):
            error = constraint.error(getattr(instance, field.name))
            if error is not None:
                raise ConfigError(f"{prefix}{field.metadata.get('name', field.name)}: {error}")
