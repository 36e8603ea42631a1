"""The values of a DeepSpeed configuration, checked when they are read, and what they add to a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflex_mega.config.launcher_keys import LauncherKeys, contradiction, show
from dataflex_mega.errors import ConfigError, did_you_mean

AUTO = "auto"


@dataclass(frozen=True)
class Section:
    """A mapping in a DeepSpeed configuration, and where it stands."""

    label: str
    path: str  # with dots; empty for the whole
    values: Mapping[str, Any]

    def name(self, key: str) -> str:
        """`deepspeed: ds.json: zero_optimization.stage`, for messages."""
        return f"{self.label}: {self.path}.{key}" if self.path else f"{self.label}: {key}"

    def section(self, key: str) -> Section:
        """An inner mapping, empty where there is none. Raises ConfigError for anything else."""
        found = self.values.get(key)
        if found is None or found is False:
            found = {}
        if key == "zero_optimization" and found is True:
            found = {"stage": 1}  # DeepSpeed's old notation
        if not isinstance(found, Mapping):
            raise ConfigError(f"{self.name(key)}: expected a mapping, found {found!r}")
        return Section(self.label, f"{self.path}.{key}" if self.path else key, found)

    def at(self, path: str) -> Section | None:
        """The mapping at `a.b`, None where there is none."""
        section = self
        for key in path.split("."):
            if section.values.get(key) in (None, False):
                return None
            section = section.section(key)
        return section

    def has(self, key: str) -> bool:
        """Whether a key has a value of its own: not missing, null or auto."""
        return self.values.get(key) not in (None, AUTO)

    def number(self, key: str, default: float) -> float:
        """A number, `default` where the key is missing or auto."""
        if not self.has(key):
            return default
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ConfigError(f"{self.name(key)}: expected a number or auto, found {value!r}")
        return value

    def integer(self, key: str, least: int | None, default: int) -> int:
        """A whole number not below `least`, `default` where the key is missing or auto; 1e3 is one."""
        value = self.number(key, default)
        if value != int(min(max(value, -1e18), 1e18)) or (least is not None and value < least):
            at_least = "" if least is None else f" >= {least}"
            raise ConfigError(f"{self.name(key)}: expected a whole number{at_least} or auto, found {value!r}")
        return int(value)

    def word(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of `allowed`, `default` where the key is missing or auto."""
        value = self.values[key] if self.has(key) else default
        if value not in allowed:
            near = did_you_mean(str(value), allowed)
            raise ConfigError(f"{self.name(key)}: expected one of {', '.join(allowed)}, found {value!r}{near}")
        return str(value)


def is_on(value: Any) -> bool:
    """Whether a key asks for something: true, a mapping with `enabled: true`, or one that is not empty and has no
    `enabled`."""
    if isinstance(value, Mapping):
        return bool(value.get("enabled", True)) and bool(value)
    return bool(value) and value != AUTO


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as far as they are known."""

    engine: str
    data_parallel: int | None  # how many share each global batch
    megatron_keys: Mapping[str, Any] = field(default_factory=dict)  # of the configuration


@dataclass
class Translation:
    """One DeepSpeed configuration on its way into the keys of a run."""

    label: str  # `deepspeed: ds_z3_config.json`, in front of each message
    keys: LauncherKeys
    ranks: Ranks
    megatron: dict[str, Any] = field(default_factory=dict)  # Megatron's keys, with engine: megatron
    layout: str = ""  # for the note
    set_keys: list[str] = field(default_factory=list)  # for the note
    clauses: list[str] = field(default_factory=list)  # for the note
    num_tuning: int = 0

    def take(self, key: str, value: Any, said: str) -> None:
        """Set a key of the run; `said` is what the file says."""
        if self.keys.take(key, value, f"{self.label}: {said}"):
            self.set_keys.append(f"{key}: {show(value)}")

    def take_megatron(self, key: str, value: Any, said: str) -> None:
        """Set a key of Megatron. Raises ConfigError when the configuration says otherwise."""
        own = self.ranks.megatron_keys.get(key)
        if own is not None and own != value:
            raise ConfigError(contradiction(f"{self.label}: {said}", f"{key}: {show(own)}"))
        self.megatron[key] = value

    @property
    def note(self) -> str:
        """One line: what was taken, and what has no counterpart."""
        tuned = f"{self.num_tuning} tuning key{'s have' if self.num_tuning != 1 else ' has'} no counterpart"
        parts = [", ".join([self.layout, *self.set_keys]), *self.clauses, *([tuned] if self.num_tuning else [])]
        return f"{self.label}: {'; '.join(parts)}"
