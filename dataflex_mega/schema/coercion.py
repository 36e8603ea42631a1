"""Values of a configuration against annotations: does `4` fit `int | None`, and if not, what would.

The one place where a value changes its type. Two strictnesses: what the package reads itself must fit; LLaMA-Factory's keys
are only checked where a wrong value is beyond doubt (a number, a truth value, one of a few words), since what else a key
takes is its own business.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.constraints import constraints_of

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    Any: "anything",
    type(None): "nothing",
}
PLURALS = {int: "whole numbers", float: "numbers", dict: "mappings", list: "lists"}


# LLaMA-Factory's keys of text with commas, which may be a list.
LISTS = frozenset(
    """
    dataset eval_dataset adapter_name_or_path add_tokens add_special_tokens interleave_probs report_to fsdp
    freeze_trainable_modules freeze_extra_modules lora_target oft_target additional_target galore_target apollo_target
    optim_target_modules ref_model_adapters reward_model_adapters debug profile_modules
    """.split()
)
SWITCHES = frozenset({"resume_from_checkpoint"})  # text that may also be true
MANY = 12  # words that a message lists


class MismatchError(Exception):
    """A value fits no alternative of an annotation."""


def coerce(key: str, value: Any, hint: Any) -> Any:
    """The value as the annotation of its key wants it.

    A whole number becomes a float where a float is wanted, 100.0 an int where an int is, "1e-3" 0.001, a list a tuple,
    `a,b` the list of a and b. Raises ConfigError naming the key for a value of another type or one that a constraint of the
    annotation refuses.
    """
    try:
        result = _coerce(value, hint, lenient=False)
    except MismatchError:
        raise ConfigError(f"{key}: {mismatch_message(value, hint)}") from None
    for constraint in constraints_of(hint):
        error = constraint.error(result)
        if error is not None:
            raise ConfigError(f"{key}: {error}")
    return result


def coerce_lenient(key: str, value: Any, hint: Any) -> Any:
    """A value of one of LLaMA-Factory's keys. Raises ConfigError where it cannot be meant: text for a number, text for a
    truth value, 1.5 for a whole number, a word that is not one of the allowed. Numbers written as text become numbers."""
    members = [_origin(member) for member in alternatives(hint)]
    _check_words(key, value, [m for m in members if isinstance(m, type) and issubclass(m, Enum)])
    if value is None and any(member in (str, list, tuple) or _is_open(member) for member in members):
        return value
    try:
        return _coerce(value, hint, lenient=True)
    except MismatchError:
        pass
    if isinstance(value, int) and value in (0, 1) and set(members) <= {bool, type(None)}:
        return bool(value)
    if str in members:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # `run_name: 2024`
        if value is False or (value is True and key in SWITCHES):
            return value  # nothing of that; `resume_from_checkpoint: true`
        if isinstance(value, list) and key in LISTS and all(isinstance(item, str | int | float) for item in value):
            return value  # it stands for comma-separated text
    raise ConfigError(f"{key}: {mismatch_message(value, hint)}")


def _check_words(key: str, value: Any, enumerations: list[type[Enum]]) -> None:
    """Raises ConfigError for what is none of the words of an enumeration, which LLaMA-Factory makes of it later."""
    words = [str(item.value) for enumeration in enumerations for item in enumeration]
    if words and value is not None and not isinstance(value, Enum) and value not in words:
        shown = ", ".join(words[:MANY]) + (", ..." if len(words) > MANY else "")
        raise ConfigError(f"{key}: expected one of {shown}, found {value!r}{did_you_mean(str(value), words)}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union in their order, `Annotated` taken off; a union inside a union is flat already."""
    if typing.get_origin(hint) is Annotated:
        hint = hint.__origin__
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _origin(hint: Any) -> Any:
    """`list` of `list[int]`, `Literal` of a Literal."""
    return typing.get_origin(hint) or hint


def _is_open(origin: Any) -> bool:
    """Whether an alternative is not known here: anything, or a class that LLaMA-Factory makes of what is given."""
    return origin is Any or (origin is not Literal and origin not in (*WORDS, list, tuple))


def _coerce(value: Any, hint: Any, lenient: bool) -> Any:
    for member in sorted(alternatives(hint), key=lambda member: _is_open(_origin(member))):
        try:
            return _coerce_to(value, member, lenient)
        except MismatchError:
            continue
    raise MismatchError


def _coerce_to(value: Any, hint: Any, lenient: bool) -> Any:
    """The value as one alternative of a union. Raises MismatchError."""
    origin, arguments = _origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType, Annotated):
        return _coerce(value, hint, lenient)
    if origin in (int, float):
        return _coerce_number(value, origin, keep_int=lenient)
    if origin in (list, tuple):
        return _coerce_items(value, origin, arguments, lenient)
    if origin is dict:
        return _coerce_mapping(value, arguments, lenient)
    if not _fits(value, origin, arguments, lenient):
        raise MismatchError
    return value


def _fits(value: Any, origin: Any, arguments: tuple[Any, ...], lenient: bool) -> bool:
    """Whether a value is what an alternative without a conversion says."""
    if origin is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in WORDS:
        return isinstance(value, origin)
    return lenient or isinstance(value, origin)


def _coerce_number(value: Any, kind: type, keep_int: bool) -> int | float:
    """NaN is no number. `keep_int`: a whole number stays an int where a float is wanted."""
    if isinstance(value, str):
        try:
            value = float(value) if any(c in value.lower() for c in ".en") else int(value)
        except ValueError:
            raise MismatchError from None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise MismatchError
    if kind is int and isinstance(value, float):
        if not value.is_integer():
            raise MismatchError
        return int(value)
    return float(value) if kind is float and not keep_int else value


def _coerce_items(value: Any, container: type, hints: tuple[Any, ...], lenient: bool) -> Any:
    """`list[T]`, `tuple[T, ...]` and `tuple[A, B]`, from a list, a tuple, or `a,b` as LLaMA-Factory writes lists."""
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",") if item.strip()]
    if not isinstance(value, list | tuple):
        raise MismatchError
    if container is tuple and hints and hints[-1] is not Ellipsis:
        if len(value) != len(hints):
            raise MismatchError
        return tuple(_coerce(item, hint, lenient) for item, hint in zip(value, hints, strict=True))
    item_hint = hints[0] if hints else Any
    return container(_coerce(item, item_hint, lenient) for item in value)


def _coerce_mapping(value: Any, hints: tuple[Any, ...], lenient: bool) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise MismatchError
    key_hint, value_hint = hints or (Any, Any)
    return {_coerce(k, key_hint, lenient): _coerce(v, value_hint, lenient) for k, v in value.items()}


# -- words -------------------------------------------------------------------------------------------------------------


def describe_type(hint: Any) -> str:
    """`a number, or nothing`."""
    return ", or ".join(_describe_one(member) for member in alternatives(hint))


def _describe_one(hint: Any) -> str:
    origin, arguments = _origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin in (list, tuple):
        item = arguments[0] if arguments else Any
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return "a list of " + " and ".join(map(describe_type, arguments))
        return "a list" if item is Any else f"a list of {PLURALS.get(item, describe_type(item))}"
    return WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")


def mismatch_message(value: Any, hint: Any) -> str:
    """`expected a number, found 'fast'`, with the nearest word where words are expected."""
    found = "nothing" if value is None else repr(value)
    literals = [member for member in alternatives(hint) if _origin(member) is Literal]
    choices = [choice for member in literals for choice in typing.get_args(member) if isinstance(choice, str)]
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"expected {describe_type(hint)}, found {found}{near}"


def type_text(hint: Any) -> str:
    """An annotation for documentation: `float`, `list[float] | None`, `'low' | 'high'`."""
    members = alternatives(hint)
    if len(members) > 1:
        return " | ".join(map(type_text, members))
    member: Any = next(iter(members))
    origin, arguments = _origin(member), typing.get_args(member)
    if origin is Literal:
        return " | ".join(repr(choice) for choice in arguments)
    if origin is type(None):
        return "None"
    if origin is Ellipsis:
        return "..."
    inner = f"[{', '.join(map(type_text, arguments))}]" if arguments else ""
    return f"{getattr(origin, '__name__', str(origin))}{inner}"
