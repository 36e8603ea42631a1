"""Learning-rate schedulers of torch and transformers: those that go by steps, and those that go by evaluations."""

from __future__ import annotations

import inspect
from typing import Any


def follows_evaluations(scheduler: Any) -> bool:
    """Whether a scheduler moves after evaluations and by their result, as ReduceLROnPlateau does, rather than by steps."""
    return "metrics" in inspect.signature(scheduler.step).parameters


def plain_state(scheduler: Any) -> dict[str, Any]:
    """Of the scheduler's state what JSON holds; the rest are functions, which its configuration makes again."""
    return {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | bool | None)
