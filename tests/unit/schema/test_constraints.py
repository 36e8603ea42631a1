"""Declared ranges: which values they allow, their words, and that every way of making an object is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.constraints import Constraint, Distinct, Range, RelativeWeights, check_fields, constraints_of


@dataclass
class Settings:
    share: Annotated[float, Range(gt=0, le=1)] = 0.5
    bounds: Annotated[float | list[float] | None, Range(ge=0)] = None
    free: float = -1.0
    derived: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        check_fields(self, "settings.")


@pytest.mark.parametrize(
    ("constraint", "allowed", "refused"),
    [
        (Range(ge=0), [0, 0.5, 1e300, None, [0, 1], [], (1,)], [-1e-9, math.inf, math.nan, [0, -1]]),
        (Range(gt=0, le=1), [1e-9, 1, True, "text"], [0, 1.0001, -math.inf]),
        (Range(ge=0, lt=1), [0, 0.999], [1, -0.1]),
        (Range(), [-1e9, 3], [math.inf, math.nan]),
        (RelativeWeights(), [None, [1], [0, 2.5]], [[], [0, 0], [1, -1], [math.inf], [math.nan, 1]]),
        (Distinct(), [None, [1], [2, 1]], [[], [1, 1]]),
    ],
)
def test_what_a_constraint_allows(constraint: Constraint, allowed: list[Any], refused: list[Any]) -> None:
    assert [constraint.error(value) for value in allowed] == [None] * len(allowed)
    assert all(constraint.error(value) for value in refused)


@pytest.mark.parametrize(
    ("constraint", "value", "message"),
    [
        (Range(ge=0, lt=1), 1.0, "must be >= 0 and < 1, found 1"),
        (Range(gt=0.25), 0.125, "must be > 0.25, found 0.125"),
        (Range(gt=0), math.inf, "must be finite and > 0, found inf"),
        (Range(), math.inf, "must be finite, found inf"),
        (Range(ge=1), [3, 0], "must be >= 1, found 0"),
        (RelativeWeights(), [0, 0], "must be finite, >= 0 and not all 0, found [0, 0]"),
        (Distinct(), [2, 2], "must be at least one, none twice, found [2, 2]"),
    ],
)
def test_the_words_name_the_rule_and_the_value(constraint: Constraint, value: Any, message: str) -> None:
    assert constraint.error(value) == message


def test_an_object_made_from_python_is_checked() -> None:
    assert Settings(share=1.0, bounds=[0.0, 3.0]).derived == 3
    with pytest.raises(ConfigError, match=r"^settings\.share: must be > 0 and <= 1, found 2$"):
        Settings(share=2.0)
    with pytest.raises(ConfigError, match=r"^settings\.bounds: must be >= 0, found -1$"):
        Settings(bounds=[1.0, -1.0])


def test_only_annotated_fields_have_constraints() -> None:
    assert constraints_of(Annotated[int, "text", Range(ge=1)]) == (Range(ge=1),)
    assert constraints_of(int) == constraints_of(int | None) == ()
