"""The frozen model of use_asft_loss, as LLaMA-Factory makes it: `ref_model`, or a second copy of the model itself."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.model_checks import UNREADABLE


def build_frozen_model(args: LFArgs, trained: Any, device_map: dict[str, str] | None = None) -> Any | None:
    """Not yet parallel; None for LoRA without `ref_model`, where the model without its adapter is the one that is meant.

    Args:
        trained: the model in training, which must have logits of the same tokens.
        device_map: where its parts are loaded; None: as LLaMA-Factory decides.

    Raises:
        ConfigError: it cannot be loaded, or has another vocabulary.
    """
    from llamafactory.train.trainer_utils import create_ref_model

    model_args = copy.copy(args.model)
    if device_map is not None:
        model_args.device_map = device_map
    name = args.finetuning.ref_model
    try:
        frozen: Any = create_ref_model(model_args, args.finetuning)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        key = f"ref_model {name!r}" if name else f"use_asft_loss: model_name_or_path {args.model.model_name_or_path!r}"
        raise ConfigError(f"{key}: {first_line(error)}") from error
    if frozen is not None:
        ours, theirs = (int(model.get_output_embeddings().weight.shape[0]) for model in (trained, frozen))
        if ours != theirs:
            raise ConfigError(f"ref_model: {name} has logits of {theirs} tokens, the model in training of {ours}")
    return frozen
