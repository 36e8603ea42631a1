"""The numbers that LLaMA-Factory's keys may be: one line a key, for all of them finite.

Bounds are those outside of which a library refuses later, in other words, or does something else without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.constraints import Range

NO_SHARE = 1e-6
LARGEST = 2**53  # above it a whole number is not exact in every library
AT_LEAST_1 = Range(ge=1)
AT_LEAST_0 = Range(ge=0)
SHARE = Range(ge=0, le=1)
POSITIVE = Range(gt=0)
BELOW_1 = Range(ge=0, lt=1)

RANGES: dict[str, Range] = {
    # the batch and the length of the run
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "cutoff_len"),
        AT_LEAST_1,
    ),
    **dict.fromkeys(
        ("max_samples", "preprocessing_num_workers", "preprocessing_batch_size", "buffer_size"), AT_LEAST_1
    ),
    "max_steps": Range(ge=-1, le=10**12),
    "val_size": AT_LEAST_0,
    "seed": Range(ge=0, lt=2**32),
    "data_seed": Range(ge=0, lt=2**32),
    # the optimizer and its schedule
    "learning_rate": AT_LEAST_0,
    "weight_decay": AT_LEAST_0,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "warmup_steps": AT_LEAST_0,
    "warmup_ratio": SHARE,
    "loraplus_lr_ratio": POSITIVE,
    "loraplus_lr_embedding": AT_LEAST_0,
    # when what happens
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": AT_LEAST_0,
    "save_total_limit": AT_LEAST_1,
    "early_stopping_steps": AT_LEAST_1,
    "eval_accumulation_steps": AT_LEAST_1,
    "torch_empty_cache_steps": AT_LEAST_1,
    # what is trained
    "lora_rank": AT_LEAST_1,
    "lora_alpha": AT_LEAST_1,
    "lora_dropout": BELOW_1,
    "oft_rank": AT_LEAST_0,
    "oft_block_size": AT_LEAST_0,
    "module_dropout": BELOW_1,
    "pissa_iter": Range(ge=-1, le=10**6),
    # processes
    "dataloader_num_workers": Range(ge=0, le=10**4),
    "dataloader_prefetch_factor": AT_LEAST_1,
    "ddp_timeout": Range(ge=1, le=2**31 - 1),
    "ddp_bucket_cap_mb": AT_LEAST_1,
}


def check_numbers(values: Mapping[str, Any], every: bool) -> None:
    """Raises ConfigError naming the first number out of range. `every`: the bounds too, else only what is not finite."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) if isinstance(value, float) else abs(value) > LARGEST:
            bound = "finite" if isinstance(value, float) else "below 2**53"
            raise ConfigError(f"{key}: must be {bound}, found {_short(value)}")
        error = RANGES[key].error(value) if every and key in RANGES else None
        if error is not None:
            raise ConfigError(f"{key}: {error}")
    _check_val_size(values.get("val_size"))


def _check_val_size(size: Any) -> None:
    """LLaMA-Factory takes what is at most NO_SHARE for nothing, 1.0 for all rows and 1 for one."""
    if isinstance(size, bool) or not isinstance(size, int | float):
        return
    if size > 1 and size != int(size):
        raise ConfigError(f"val_size: a share of the rows below 1, or a whole number of rows, found {size}")
    if size == 1 and isinstance(size, float):
        raise ConfigError("val_size: 1.0 is the share of all rows, which leaves none to train on; 1 is one row")
    if 0 < size <= NO_SHARE:
        raise ConfigError(f"val_size: a share of {size} is taken for none; it must be above {NO_SHARE}, or 0")


def _short(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"a number of {len(text)} digits"
