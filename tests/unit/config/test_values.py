import math

import pytest

from dataflex_mega.config.values import describe, fit, fit_loosely, kinds
from dataflex_mega.errors import ConfigError


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ("int | None", "a whole number, or nothing"),
        ("typing.Optional[str]", "text, or nothing"),
        ("typing.Union[str, NoneType, typing.Literal[False]]", "text, or nothing, or one of False"),
        ("typing.Literal['pt', 'sft']", "one of pt, sft"),
        ("None | str | list[str]", "nothing, or text, or a list of text"),
        ("dict[str, typing.Any] | str | None", "a mapping, or text, or nothing"),
        ("list[typing.Any]", "a list"),
        ("list", "a list"),
        ("some.module.Class", "anything"),
        ("bool", "true or false"),
    ],
)
def test_annotations_are_read_in_every_spelling(annotation, words):
    assert describe(kinds(annotation)) == words


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, "int", 3),
        (1e2, "int", 100),
        ("4", "int", 4),
        (3, "float", 3),
        ("1e-3", "float", 0.001),
        (math.inf, "float", math.inf),
        (None, "int | None", None),
        ([1, 0.5], "list[float] | None", [1, 0.5]),
        ("0.7, 0.3", "list[float]", [0.7, 0.3]),
        ((1, 2), "list[int]", [1, 2]),
        ("a,b", "list[str]", ["a", "b"]),
        ("a,b", "str | list[str] | None", "a,b"),
        ({"name": "x"}, "str | dict[str, Any] | None", {"name": "x"}),
        (True, "bool", True),
        (object, "some.Class", object),
    ],
)
def test_a_value_that_fits_comes_back_as_its_type(value, annotation, expected):
    found = fit("key", value, annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (1.5, "int", "key: expected a whole number, found 1.5"),
        (True, "int", "key: expected a whole number, found True"),
        (True, "float", "key: expected a number, found True"),
        ("fast", "float", "key: expected a number, found 'fast'"),
        (math.nan, "float", "key: expected a number, found nan"),
        ("nan", "float", "key: expected a number, found 'nan'"),
        (math.inf, "int", "key: expected a whole number, found inf"),
        (None, "int", "key: expected a whole number, found nothing"),
        (1, "bool", "key: expected true or false, found 1"),
        ("yes", "bool", "key: expected true or false, found 'yes'"),
        (2024, "str", "key: expected text, found 2024"),
        ([1, "x"], "list[float]", "key: expected a list of a number, found [1, 'x']"),
        (0.5, "list[float]", "key: expected a list of a number, found 0.5"),
        ([], "dict", "key: expected a mapping, found []"),
        ("exakt", "Literal['micro', 'exact']", "key: expected one of micro, exact, found 'exakt' (did you mean 'exact'?)"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_with_what_was_expected(value, annotation, message):
    with pytest.raises(ConfigError) as caught:
        fit("key", value, annotation)
    assert str(caught.value) == message


def test_an_infinite_number_is_no_whole_number_even_as_text():
    with pytest.raises(ConfigError, match="expected a whole number"):
        fit("key", "inf", "int")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, "bool", True),
        (0, "bool | None", False),
        (2024, "str | None", "2024"),
        (["a", "b"], "str | None", ["a", "b"]),
        (True, "str | None", True),
        (None, "str", None),
        (None, "AttentionFunction", None),
        ("1e-3", "float", 0.001),
        (3, "float", 3),
        ("steps", "transformers.trainer_utils.IntervalStrategy | str", "steps"),
        (False, "typing.Union[str, NoneType, typing.Literal[False]]", False),
        ('{"a": 1}', "dict | str | None", '{"a": 1}'),
    ],
)
def test_llamafactory_values_are_left_alone_where_they_may_be_meant(value, annotation, expected):
    found = fit_loosely("key", value, annotation)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("fast", "float", "expected a number, found 'fast'"),
        (None, "float", "expected a number, found nothing"),
        (1.5, "int", "expected a whole number, found 1.5"),
        ("true", "bool", "expected true or false, found 'true'"),
        (2, "bool", "expected true or false, found 2"),
        (True, "int | None", "expected a whole number, or nothing, found True"),
        ("sftt", "typing.Literal['pt', 'sft']", "expected one of pt, sft, found 'sftt' (did you mean 'sft'?)"),
        ([1], "float", "expected a number, found [1]"),
    ],
)
def test_llamafactory_values_beyond_doubt_wrong_are_refused(value, annotation, message):
    with pytest.raises(ConfigError) as caught:
        fit_loosely("key", value, annotation)
    assert str(caught.value) == f"key: {message}"
