"""The reference model of a preference stage, as LLaMA-Factory's key ref_model names it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.model_checks import UNREADABLE


def load_ref_model(args: LFArgs, device_map: dict[str, str] | None = None) -> Any:
    """The model of ref_model with ref_model_adapters, not trained. `device_map`: as in `model.build_model`.

    Raises ConfigError with the library's words when it cannot be loaded.
    """
    from llamafactory.train.trainer_utils import create_ref_model

    model_args = copy.copy(args.model)
    if device_map is not None:
        model_args.device_map = device_map
    try:
        return create_ref_model(model_args, args.finetuning)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"ref_model {args.finetuning.ref_model!r}: {first_line(error)}") from error
