"""LLaMA-Factory's `disable_shuffling` and transformers' `train_sampling_strategy: sequential`: the rows as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError

CHOOSERS = {
    "selector": "chooses the samples",
    "mixer": "draws in proportions",
    "reorder": "orders the samples itself",
}


def keeps_order(lf_values: Mapping[str, Any]) -> bool:
    """Whether samples are to come in the order of the files."""
    return _key(lf_values) is not None


def _key(lf_values: Mapping[str, Any]) -> str | None:
    if lf_values.get("disable_shuffling"):
        return "disable_shuffling: true"
    return "train_sampling_strategy: sequential" if lf_values.get("train_sampling_strategy") == "sequential" else None


def check_order(config: RunConfig) -> None:
    """Raises ConfigError when something else says which sample comes next."""
    key = _key(config.llamafactory)
    if key is None:
        return
    if config.interleaving is not None:
        raise ConfigError(
            f"{key}: does not go with mix_strategy: {config.interleaving.strategy}, whose proportions say what a step "
            "draws; drop one"
        )
    for role, does in CHOOSERS.items():
        if role in config.roles:
            name = config.roles[role].get("name", "")
            raise ConfigError(f"{key}: does not go with {role} {name}, which {does}; drop one")
