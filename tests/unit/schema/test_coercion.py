"""Values against annotations: what fits, what becomes another type, and the words for what does not fit."""

from __future__ import annotations

import math
import types
import typing
from typing import Annotated, Any, Literal

import pytest

from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.coercion import coerce, coerce_lenient, describe_type, type_text
from dataflex_mega.schema.constraints import Range


class Other:
    """A class that is not known here."""


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "a whole number, or nothing"),
        (typing.Optional[str], "text, or nothing"),  # noqa: UP045
        (typing.Union[str, None, Literal[False]], "text, or nothing, or one of False"),  # noqa: UP007
        (Literal["pt", "sft"], "one of pt, sft"),
        (None | str | list[str], "nothing, or text, or a list of text"),
        (list[float], "a list of numbers"),
        (list[list[int]], "a list of a list of whole numbers"),
        (tuple[float, float], "a list of a number and a number"),
        (dict[str, Any] | str | None, "a mapping, or text, or nothing"),
        (list[Any], "a list"),
        (list, "a list"),
        (Any, "anything"),
        (Other, "a Other"),
        (bool, "true or false"),
        (Annotated[int | None, Range(ge=1)], "a whole number, or nothing"),
    ],
)
def test_annotations_in_words(hint: Any, words: str) -> None:
    assert describe_type(hint) == words


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (float, "float"),
        (list[float] | None, "list[float] | None"),
        (Literal["low", "high"], "'low' | 'high'"),
        (tuple[int, ...], "tuple[int, ...]"),
        (Annotated[float | list[float] | None, Range(ge=0)], "float | list[float] | None"),
    ],
)
def test_annotations_in_documentation(hint: Any, text: str) -> None:
    assert type_text(hint) == text


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (1e2, int, 100),
        ("4", int, 4),
        (3, float, 3.0),
        ("1e-3", float, 0.001),
        (math.inf, float, math.inf),
        (None, int | None, None),
        ("x", str, "x"),
        (3, int | str, 3),
        (True, int | bool, True),
        ([1, 0.5], list[float] | None, [1.0, 0.5]),
        ("0.7, 0.3", list[float], [0.7, 0.3]),
        ((1, 2), list[int], [1, 2]),
        ([1, 2], list, [1, 2]),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([[1], [2, 3]], list[list[float]], [[1.0], [2.0, 3.0]]),
        ("a,b", list[str], ["a", "b"]),
        ("a,b", str | list[str] | None, "a,b"),
        ({"name": "x"}, str | dict[str, Any] | None, {"name": "x"}),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1]}, dict, {"a": [1]}),
        (2, Literal[1, 2], 2),
        (True, bool, True),
        (object, Any, object),
    ],
)
def test_a_value_that_fits_comes_back_as_its_type(value: Any, hint: Any, expected: Any) -> None:
    result = coerce("key", value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1.5, int, "key: expected a whole number, found 1.5"),
        (True, int, "key: expected a whole number, found True"),
        (True, float, "key: expected a number, found True"),
        ("fast", float, "key: expected a number, found 'fast'"),
        (math.nan, float, "key: expected a number, found nan"),
        ("nan", float, "key: expected a number, found 'nan'"),
        (math.inf, int, "key: expected a whole number, found inf"),
        ("inf", int, "key: expected a whole number, found 'inf'"),
        (None, int, "key: expected a whole number, found nothing"),
        (1, bool, "key: expected true or false, found 1"),
        (0, bool, "key: expected true or false, found 0"),
        ("yes", bool, "key: expected true or false, found 'yes'"),
        (2024, str, "key: expected text, found 2024"),
        ([1, "x"], list[float], "key: expected a list of numbers, found [1, 'x']"),
        (0.5, list[float], "key: expected a list of numbers, found 0.5"),
        ([1, 2], tuple[int], "key: expected a list of a whole number, found [1, 2]"),
        ([], dict, "key: expected a mapping, found []"),
        ({"a": "x"}, dict[str, float], "key: expected a mapping, found {'a': 'x'}"),
        (True, Literal[1, 2], "key: expected one of 1, 2, found True"),
        (1.0, Literal[1, 2], "key: expected one of 1, 2, found 1.0"),
        (3, Other, "key: expected a Other, found 3"),
        (types.SimpleNamespace(), str, "key: expected text, found namespace()"),
        ("stepp", Literal["batch", "step"], "key: expected one of batch, step, found 'stepp' (did you mean 'step'?)"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_was_expected(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        coerce("key", value, hint)
    assert str(caught.value) == message


def test_a_value_that_fits_its_type_is_compared_with_the_declared_range() -> None:
    assert coerce("key", "3", Annotated[int, Range(ge=1)]) == 3
    with pytest.raises(ConfigError, match=r"^key: must be >= 1, found 0$"):
        coerce("key", 0, Annotated[int, Range(ge=1)])
    with pytest.raises(ConfigError, match=r"^key: expected a whole number, found 'x'$"):
        coerce("key", "x", Annotated[int, Range(ge=1)])


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, bool, True),
        (0, bool | None, False),
        (2024, str | None, "2024"),
        (["a", "b"], str | None, ["a", "b"]),
        (True, str | None, True),
        (None, str, None),
        (None, Other, None),
        ("auto", Other, "auto"),
        ("1e-3", float, 0.001),
        (3, float, 3),
        ("5", Other | int, 5),
        ("steps", Other | str, "steps"),
        (False, typing.Union[str, None, Literal[False]], False),  # noqa: UP007
        ('{"a": 1}', dict | str | None, '{"a": 1}'),
    ],
)
def test_llamafactory_values_are_left_alone_where_they_may_be_meant(value: Any, hint: Any, expected: Any) -> None:
    key = "dataset" if isinstance(value, list) else "resume_from_checkpoint" if value is True else "key"
    result = coerce_lenient(key, value, hint)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("fast", float, "expected a number, found 'fast'"),
        (None, float, "expected a number, found nothing"),
        (None, Literal["pt"], "expected one of pt, found nothing"),
        (1.5, int, "expected a whole number, found 1.5"),
        ("true", bool, "expected true or false, found 'true'"),
        (2, bool, "expected true or false, found 2"),
        (True, int | None, "expected a whole number, or nothing, found True"),
        ("sftt", Literal["pt", "sft"], "expected one of pt, sft, found 'sftt' (did you mean 'sft'?)"),
        ([1], float, "expected a number, found [1]"),
    ],
)
def test_llamafactory_values_beyond_doubt_wrong_are_refused(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        coerce_lenient("key", value, hint)
    assert str(caught.value) == f"key: {message}"
