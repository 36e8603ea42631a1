"""Keys that go by evaluations: which model is the best, when to stop, and evaluations before and after the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.errors import ConfigError, did_you_mean

SAVE_STRATEGIES = ("steps", "epoch", "no", "best")


def strategy(values: Mapping[str, Any], key: str, default: str) -> str:
    """The value of a key like eval_strategy as its name; a YAML's bare `no` is false."""
    value = values.get(key)
    return default if value is None else "no" if value is False else str(value)


def check_best_model(values: Mapping[str, Any], has_data: bool) -> None:
    """Raises ConfigError for a key that waits for evaluations which never come, or that goes by evaluations of other steps
    than those that are saved. `values`: LLaMA-Factory's keys; `has_data`: whether there is anything to evaluate."""
    evaluates, saves = strategy(values, "eval_strategy", "no"), strategy(values, "save_strategy", "steps")
    if saves not in SAVE_STRATEGIES:
        near = did_you_mean(saves, SAVE_STRATEGIES)
        raise ConfigError(f"save_strategy: expected {', '.join(SAVE_STRATEGIES)}, found {saves!r}{near}")
    for key in ("do_eval", "eval_on_start"):
        if values.get(key) and not has_data:
            raise ConfigError(f"{key}: true needs eval_dataset, val_size or eval_corpus_dir")
    waiting = [key for key in ("early_stopping_steps", "load_best_model_at_end") if values.get(key)]
    waiting += ["save_strategy: best"] if saves == "best" else []
    if waiting and evaluates == "no":
        raise ConfigError(f"{waiting[0]}: needs eval_strategy: steps or epoch")
    if values.get("load_best_model_at_end") and saves not in (evaluates, "best"):
        raise ConfigError(
            f"load_best_model_at_end: needs a checkpoint of every evaluation that may be the best, found eval_strategy "
            f"{evaluates} and save_strategy {saves}; set save_strategy: {evaluates}, or best"
        )
