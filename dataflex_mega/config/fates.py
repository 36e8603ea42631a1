"""What becomes of LLaMA-Factory's keys in a dynamic run, where it is not what LLaMA-Factory does with them.

REFUSED in checks.py and here are keys that would change what is computed or what is left behind; NOTED are keys that change
neither, or that something else stands for. A key in none of these tables is acted on, or belongs to what is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataflex_mega.errors import ConfigError

NOT_THERE = "dynamic training does not do this"


@dataclass(frozen=True)
class Fate:
    """A key that has no effect. `harmless` are the values under which nothing is lost by that."""

    harmless: tuple[Any, ...]
    why: str  # what happens instead, or what does it
    refused: bool = False  # else a note


def _refused(why: str, *harmless: Any) -> Fate:
    return Fate(harmless, why, refused=True)


def _noted(why: str, *harmless: Any) -> Fate:
    return Fate(harmless, why)


OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_STATIC = "train_type: static does"
_PREFETCH = "prefetch says how many steps of data are prepared ahead"
_HUB = "nothing is uploaded during a run"
_RAY = "Ray starts no dynamic run; torchrun does"

FATES: dict[str, Fate] = {
    "ignore_pad_token_for_loss": _refused("padding is never a target", None, True),
    "average_tokens_across_devices": _refused("a token counts the same on every rank", None, True),
    "torch_compile_backend": _refused(_STATIC, *OFF),
    "torch_compile_mode": _refused(_STATIC, *OFF),
    "profile_modules": _refused(_STATIC, *OFF),
    "debug": _refused(_STATIC, *OFF),
    "skip_memory_metrics": _refused(_STATIC, None, True),
    "prediction_loss_only": _noted("evaluation gives the loss only", *OFF),
    "save_only_model": _noted(
        "checkpoints are whole, since a run continues from them; the model alone is exported at the end", *OFF
    ),
    "include_num_input_tokens_seen": _noted("metrics.jsonl counts the tokens", None, False, "no"),
    "include_effective_tokens_per_second": _noted("metrics.jsonl has the tokens of each step", *OFF),
    **dict.fromkeys(
        ("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        _noted(_PREFETCH, None, True, False),
    ),
    "dataloader_prefetch_factor": _noted(_PREFETCH, None),
    "dataloader_persistent_workers": _noted(_PREFETCH, *OFF),
    "dataloader_drop_last": _noted("every step has a full batch", *OFF),
    "torch_empty_cache_steps": _noted("the cache is left to torch", *OFF),
    "eval_accumulation_steps": _noted("evaluation adds sums up and keeps no outputs", *OFF),
    "include_for_metrics": _noted("evaluation gives the loss only", *OFF),
    "batch_eval_metrics": _noted("evaluation gives the loss only", *OFF),
    "gradient_checkpointing_kwargs": _noted("use_reentrant_gc and disable_gradient_checkpointing say how", *OFF),
    "use_cache": _noted("training keeps no cache of keys and values", *OFF),
    "ddp_bucket_cap_mb": _noted("buckets have torch's size", *OFF),
    "ddp_broadcast_buffers": _noted("buffers are those that were loaded", *OFF),
    "ddp_static_graph": _noted("the graph is not fixed", *OFF),
    "run_name": _noted("no tracker is written to that shows it", *OFF),
    "save_on_each_node": _noted("one process writes what all need; the nodes share output_dir", *OFF),
    "restore_callback_states_from_checkpoint": _noted("callbacks are restored from every checkpoint", *OFF),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push"), _noted(_HUB, *OFF)),
    **dict.fromkeys(("ray_num_workers", "ray_init_kwargs"), _noted(_RAY, *OFF, 1)),
}


def check_fates(values: Mapping[str, Any]) -> list[str]:
    """Notes on the keys that have no effect. Raises ConfigError for one that would change what is computed."""
    notes = []
    for key, value in values.items():
        fate = FATES.get(key)
        if fate is None or any(value == harmless and type(value) is type(harmless) for harmless in fate.harmless):
            continue
        if fate.refused:
            raise ConfigError(f"{key}: {value!r}: {NOT_THERE}; {fate.why}")
        notes.append(f"{key}: has no effect in dynamic training; {fate.why}")
    if values.get("do_eval") and str(values.get("eval_strategy", "no")) == "no":
        raise ConfigError(
            "do_eval: needs eval_strategy: steps or epoch in dynamic training, which evaluates while it trains"
        )
    return notes
