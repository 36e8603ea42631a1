"""`train_type: static` is LLaMA-Factory's own training, every stage of it."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import REFUSALS, first_line, without_idle_ddp_backend
from dataflex_mega.llamafactory.callbacks import load_callbacks
from dataflex_mega.llamafactory.compat import ensure_importable
from dataflex_mega.llamafactory.data import check_names
from dataflex_mega.llamafactory.model import check_template

# What LLaMA-Factory and transformers call before a training's first step: an error from inside is about the configuration.
PARSING = ("get_train_args", "get_ray_args", "add_callback", "create_accelerator_and_postprocess")
LOADING = (
    "load_tokenizer", "get_template_and_fix_tokenizer", "get_dataset", "load_model", "create_ref_model",
    "create_reward_model",
)  # fmt: skip


def run_static(lf: dict[str, Any], callbacks: list[str], datasets: list[str]) -> None:
    """Run LLaMA-Factory's `run_exp` on these keys, `on_this_machine`. `callbacks` are `package.module:Class` names.

    Raises DataError for one of `datasets` that is unknown or missing, before anything is loaded, and ConfigError with
    LLaMA-Factory's own words for what it refuses before training.
    """
    ensure_importable()
    from llamafactory.train.tuner import run_exp

    for name in datasets:
        check_names([name], lf.get("dataset_dir", "data"))
    check_template(lf.get("template"))
    user_callbacks = load_callbacks(callbacks)
    try:
        run_exp(on_this_machine(lf), user_callbacks)
    except (*REFUSALS, RuntimeError) as error:
        if not is_refusal(error):
            raise
        message = first_line(error)
        about = f"model_name_or_path {lf.get('model_name_or_path')!r}: " if message.startswith("Failed to load") else ""
        raise ConfigError(f"{about}{message}") from error


def on_this_machine(lf: dict[str, Any]) -> dict[str, Any]:
    """The same keys; with bf16 on a machine that has nothing but a CPU also `use_cpu`, without which it is refused.

    `hub_token` becomes the variable HF_TOKEN: transformers would pickle it into every training_args.bin.
    """
    from llamafactory.extras.misc import get_device_count

    ready = without_idle_ddp_backend(lf)
    token = ready.pop("hub_token", None)
    if token:
        os.environ["HF_TOKEN"] = str(token)
    if ready.get("bf16") and get_device_count() == 0:
        ready.setdefault("use_cpu", True)
    return ready


def is_refusal(error: BaseException) -> bool:
    """Whether a package is missing, or it came out of what is done before a training rather than out of the training."""
    if isinstance(error, ImportError):
        return True
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if names.intersection(PARSING):
        return True
    return isinstance(error, REFUSALS) and not isinstance(error, torch.OutOfMemoryError) and bool(names & set(LOADING))
