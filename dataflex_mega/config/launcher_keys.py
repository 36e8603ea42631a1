"""Keys that a launcher sets in place of the configuration, checked against those that the configuration has itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflex_mega.errors import ConfigError

# What LLaMA-Factory takes where its key is missing. A launcher that says the same sets nothing, so that a run is the same
# run, whose checkpoints can be resumed, however it was started.
DEFAULTS: dict[str, Any] = {
    "fsdp": "",
    "bf16": False,
    "fp16": False,
    "use_cpu": False,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
}
PRECISIONS = ("bf16", "fp16")
LAYOUT_KEYS = ("fsdp", "fsdp_config")  # nothing is said by false, an empty text or an empty mapping


@dataclass
class LauncherKeys:
    """The keys of a configuration and what launchers add to them."""

    given: Mapping[str, Any]
    taken: dict[str, Any] = field(default_factory=dict)  # to be added to `given`
    notes: list[str] = field(default_factory=list)  # for the user, one line each
    _said: dict[str, tuple[Any, str]] = field(default_factory=dict)  # key -> value and who said it

    def value(self, key: str) -> Any:
        """What the run will use: given, taken, or LLaMA-Factory's default."""
        for values in (self.given, self.taken, DEFAULTS):
            if values.get(key) is not None:
                return values[key]
        return None

    def take(self, key: str, value: Any, source: str) -> bool:
        """Set `key` unless it has this value anyway -> whether it was set.

        Raises ConfigError naming `source` and the other side, when the configuration or another launcher says otherwise.
        """
        own = self.given.get(key)
        if own is not None and (own or key not in LAYOUT_KEYS):
            if own != value:
                raise ConfigError(contradiction(source, f"{key}: {show(own)}"))
            return False
        other, earlier = self._said.setdefault(key, (value, source))
        if other != value:
            raise ConfigError(contradiction(source, earlier))
        if key in self.taken or DEFAULTS.get(key) == value:
            return False
        self.taken[key] = value
        return True

    def take_precision(self, precision: str, source: str) -> bool:
        """Set bf16 or fp16, as `take`. The other of the two must not be asked for."""
        if precision == "bf16" and self.given.get("pure_bf16"):
            return False
        other = PRECISIONS[1 - PRECISIONS.index(precision)]
        if self.given.get(other):
            raise ConfigError(contradiction(source, f"{other}: true"))
        if other in self.taken:
            raise ConfigError(contradiction(source, self._said[other][1]))
        return self.take(precision, True, source)

    def forbid_precision(self, precision: str, source: str) -> None:
        """Raises ConfigError when the run has this precision, which `source` turns off."""
        if self.given.get(precision):
            raise ConfigError(contradiction(source, f"{precision}: true"))
        if precision in self.taken:
            raise ConfigError(contradiction(source, self._said[precision][1]))


def contradiction(one: str, other: str) -> str:
    """The message about two places that cannot both be meant."""
    return f"{one} contradicts {other}; drop one of them"


def show(value: Any) -> str:
    """A value as it is written in a YAML or JSON file."""
    return value if isinstance(value, str) else json.dumps(value)
