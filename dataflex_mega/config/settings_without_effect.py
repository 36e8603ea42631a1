"""Settings by which a role, an evaluation or a checkpoint never happens: each is a note, found from the configuration alone.

What depends on the data or on the processes (domains, the length of a run in epochs, the batch) is in run.effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError

LOSS_SCALE_KEYS = ("loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale")  # of fsdp_config


def notes_on_settings(config: RunConfig) -> list[str]:
    """A note for each setting that keeps something from ever happening."""
    return [note for check in CHECKS for note in check(config) if note]


# What LLaMA-Factory does in each stage when it is asked to.
DONE_IN_STAGE = {
    "pt": ("do_train", "do_eval"), "sft": ("do_train", "do_eval", "do_predict"),
    "rm": ("do_train", "do_eval", "do_predict"), "ppo": ("do_train",), "dpo": ("do_train", "do_eval"),
    "kto": ("do_train", "do_eval"),
}  # fmt: skip


def notes_on_static(keys: Mapping[str, Any]) -> list[str]:
    """A note for a static run that does nothing: LLaMA-Factory loads data and model and ends as if all were well."""
    stage = str(keys.get("stage") or "sft")
    asked = DONE_IN_STAGE.get(stage, ())
    if not asked or any(keys.get(key) for key in asked):
        return []
    return [
        f"do_train: is not true, nor is {' or '.join(asked[1:])}, so this run loads what it needs and does nothing; "
        "do_train: true trains"
        if len(asked) > 1
        else "do_train: is not true, so this run loads what it needs and does nothing; do_train: true trains"
    ]


def _steps(config: RunConfig) -> int | None:
    """The length of the run where the configuration says it."""
    steps = int(config.llamafactory.get("max_steps", -1))
    return config.dataflex.train_step or (steps if steps > 0 else None)


def _beyond_the_end(config: RunConfig) -> list[str]:
    """Logging, evaluations and checkpoints that come after the last step."""
    steps, notes = _steps(config), []
    strategies = {"logging_steps": "logging_strategy", "eval_steps": "eval_strategy", "save_steps": "save_strategy"}
    happens = {
        "logging_steps": "no step is printed", "eval_steps": "nothing is evaluated",
        "save_steps": "the only checkpoint is that of the last step",
    }  # fmt: skip
    for key, strategy in strategies.items():
        every = config.llamafactory.get(key)
        default = "no" if key == "eval_steps" else "steps"
        asked = str(config.llamafactory.get(strategy, default)).rpartition(".")[2].lower() == "steps"
        if asked and steps is not None and isinstance(every, int | float) and every > steps:
            notes.append(f"{key}: {every} is above the {steps} steps of the run: {happens[key]}")
    return notes


def _early_stopping(config: RunConfig) -> list[str]:
    patience, steps = config.llamafactory.get("early_stopping_steps"), _steps(config)
    every: Any = config.llamafactory.get("eval_steps") or config.llamafactory.get("logging_steps")
    if (
        patience
        and steps is not None
        and isinstance(every, int | float)
        and every >= 1
        and every * (patience + 1) > steps
    ):
        return [
            f"early_stopping_steps: {patience} evaluations without improvement cannot come before step "
            f"{int(every * (patience + 1))}, the run ends at {steps}"
        ]
    return []


def _never_updated(config: RunConfig) -> list[str]:
    keys = config.dataflex
    if keys.update_times == 0 and "mixer" in config.roles and "selector" not in config.roles:
        return [f"update_times: 0: mixer {config.roles['mixer']['name']} never moves the proportions"]
    return []


def _checkpointing(config: RunConfig) -> list[str]:
    keys = config.llamafactory
    if keys.get("gradient_checkpointing") and keys.get("disable_gradient_checkpointing"):
        return ["gradient_checkpointing: has no effect beside disable_gradient_checkpointing: true"]
    return []


def _sharding(config: RunConfig) -> list[str]:
    """What `fsdp_config` says where nothing is sharded; how fp16 scales the loss is said there too."""
    keys: Any = config.llamafactory.get("fsdp_config")
    if config.engine != "fsdp" or config.llamafactory.get("fsdp") or not isinstance(keys, Mapping):
        return []
    unread = [key for key in keys if str(key).removeprefix("fsdp_") not in LOSS_SCALE_KEYS]
    return [f"fsdp_config: {', '.join(unread)}: no effect without fsdp"] if unread else []


def _model_only(config: RunConfig) -> list[str]:
    """Raises ConfigError for checkpoints that are to hold nothing."""
    if not config.llamafactory.get("save_only_model"):
        return []
    whole = str(config.llamafactory.get("finetuning_type", "lora")) not in ("lora", "oft")
    if whole and config.dataflex.save_hf_checkpoints == "never":
        raise ConfigError("save_hf_checkpoints: never, but save_only_model: true leaves nothing else in a checkpoint")
    return ["save_only_model: no run can continue from its checkpoints, but from the one that SIGTERM leaves"]


CHECKS: tuple[Callable[[RunConfig], list[str]], ...] = (
    _beyond_the_end, _early_stopping, _never_updated, _checkpointing, _sharding, _model_only,
)  # fmt: skip
