"""Tokenizer, template and model as LLaMA-Factory builds them: full, freeze and LoRA, from scratch or from weights."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.model_checks import UNREADABLE, read_config
from dataflex_mega.llamafactory.processors import complete_processor


def load_tokenizer(args: LFArgs) -> tuple[dict[str, Any], Any]:
    """({"tokenizer", "processor"}, template). Must come before the model: fixing the template may grow the vocabulary."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer as load

    check_template(args.data.template)
    if Path(str(args.model.model_name_or_path)).is_dir():
        read_config(args)  # of which a tokenizer says no more than that it cannot be loaded
    try:
        module = load(args.model)
        template = get_template_and_fix_tokenizer(module["tokenizer"], args.data)
    except UNREADABLE as error:
        cause = error.__cause__ if isinstance(error, OSError) and error.__cause__ is not None else error
        message = f"model_name_or_path {args.model.model_name_or_path!r}: tokenizer: {first_line(cause)}"
        raise ConfigError(message) from error
    found = dict(module)
    complete_processor(args, found, template)
    return found, template


def save_tokenizer(module: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer, and the processor of a model that takes images, videos or audio."""
    module["tokenizer"].save_pretrained(folder)
    if module.get("processor") is not None:
        module["processor"].save_pretrained(folder)


def check_template(name: str | None) -> None:
    """Raises ConfigError for a template that LLaMA-Factory does not have, with the nearest that it has."""
    from llamafactory.data.template import TEMPLATES

    if name is not None and name not in TEMPLATES:
        raise ConfigError(f"template: there is no {name!r}{did_you_mean(name, TEMPLATES)}")


def build_model(args: LFArgs, tokenizer: Any, device_map: dict[str, str] | None = None) -> Any:
    """The trainable Hugging Face model, or the PEFT model around it, not yet parallel.

    `device_map`: where its parts are loaded; None: as LLaMA-Factory decides.
    """
    from llamafactory.model import load_model

    model_args = args.model
    if device_map is not None:
        model_args = copy.copy(args.model)
        model_args.device_map = device_map
        model_args.quantization_device_map = "auto"  # a quantised model takes it too

    try:
        model = load_model(tokenizer, model_args, args.finetuning, is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"{_key_of(args, error)}: {first_line(error)}") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"finetuning_type {args.finetuning.finetuning_type!r} leaves no parameter to train")
    return model


# The part of LLaMA-Factory's loading in which an error is about a key of its own.
KEY_OF_STEP = {
    "configure_attn_implementation": "flash_attn",
    "configure_rope": "rope_scaling",
    "configure_longlora": "shift_attn",
    "configure_quantization": "quantization_config of the model",
    "apply_liger_kernel": "enable_liger_kernel",
    "_setup_freeze_tuning": "freeze_trainable_layers, freeze_trainable_modules",
    "_setup_lora_tuning": "lora_target, adapter_name_or_path",
    "resize_embedding_layer": "resize_vocab",
}


def _key_of(args: LFArgs, error: BaseException) -> str:
    steps = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    source = f"model_name_or_path {args.model.model_name_or_path!r}"
    key = next((key for step, key in KEY_OF_STEP.items() if step in steps), None)
    return source if key is None else f"{key}, {source}"


def freeze_gates(model: Any) -> int:
    """Stop training the routers of mixture-of-experts layers -> how many parameters that are.

    A router is a module named `gate` or `router`; the `gate_proj` of an MLP is not one. Raises ConfigError if none is.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        if {"gate", "router"} & set(name.split(".")[:-1]):
            parameter.requires_grad_(False)
            frozen += 1
    if frozen == 0:
        raise ConfigError("freeze_gate: the model has no router (a module named gate or router) to freeze")
    return frozen
