"""What can become of a key of LLaMA-Factory in a dynamic run: it acts, it is noted, or it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
STATIC_DOES = "train_type: static does"


@dataclass(frozen=True)
class Switch:
    """The keys of which one must be on for another to act; with `values`, a key that must have one of these."""

    keys: tuple[str, ...]
    values: tuple[str, ...] = ()
    default: str = ""  # of a key with `values`
    alternative: Switch | None = None  # which does as well

    def is_on(self, keys: Mapping[str, Any]) -> bool:
        """Whether a configuration has it on."""
        if self.alternative is not None and self.alternative.is_on(keys):
            return True
        if self.values:
            value = keys.get(self.keys[0])
            return str(self.default if value is None else value) in self.values
        return any(not is_one_of(keys.get(key), OFF) for key in self.keys)

    def __str__(self) -> str:
        own = f"{self.keys[0]}: {' or '.join(self.values)}" if self.values else " or ".join(self.keys)
        return own if self.alternative is None else f"{own} or {self.alternative}"


@dataclass(frozen=True)
class Fate:
    """What becomes of one key."""

    verb: Literal["acts", "noted", "refused"]
    why: str = ""  # noted, refused: what happens instead, or what does it; acts: why not with other values than `takes`
    harmless: tuple[Any, ...] = OFF  # noted, refused, with a switch: the default and all by which nothing is lost
    takes: tuple[Any, ...] = ()  # acts: the only values it may have, the default first; none: any
    switch: Switch | None = None  # acts: not without this one
    names_value: bool = False  # refused: whether the message repeats the value

    @property
    def names_taken(self) -> list[str]:
        """The values of `takes` that are worth naming."""
        return [str(value) for value in self.takes if isinstance(value, str | bool) and not is_one_of(value, OFF)]

    def is_harmless(self, value: Any) -> bool:
        """Whether nothing is lost by it that this value has no effect. A mapping is, when each of its items is."""
        plain = getattr(value, "value", value)
        if isinstance(plain, Mapping):
            known = {
                key: v for harmless in self.harmless if isinstance(harmless, Mapping) for key, v in harmless.items()
            }
            return all(key in known and known[key] == item for key, item in plain.items())
        return is_one_of(plain, self.harmless)


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership in which true is not 1, and false is not 0."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def acts(*keys: str) -> dict[str, Fate]:
    """Keys that do here what they do in LLaMA-Factory."""
    return dict.fromkeys(keys, Fate("acts"))


def takes(values: tuple[Any, ...], why: str) -> Fate:
    """A key that acts with some of its values only, the default first; the others are refused."""
    return Fate("acts", why, takes=values)


def acts_with(switch: Switch, defaults: Mapping[str, Any]) -> dict[str, Fate]:
    """Keys that do nothing unless something else is on; `defaults`: key -> the value that says nothing."""
    return {key: Fate("acts", harmless=_harmless(default), switch=switch) for key, default in defaults.items()}


def noted(why: str, *harmless: Any) -> Fate:
    """A key without effect that changes nothing of the result, or that something else stands for."""
    return Fate("noted", why, _harmless(*harmless))


def refused(instead: str, *harmless: Any) -> Fate:
    """A key that would change what is computed or left behind, and that nothing here does."""
    names_value = any(not isinstance(value, Mapping) for value in harmless)
    return Fate("refused", instead, _harmless(*harmless), names_value=names_value)


def _harmless(*values: Any) -> tuple[Any, ...]:
    """Without any value but such as are off: all that are off. A key that is null has its default."""
    return OFF if all(is_one_of(value, OFF) for value in values) else (*values, None)
