"""An adapter merged into its model, as LLaMA-Factory merges."""

from __future__ import annotations

from typing import Any

import torch

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.model_checks import UNREADABLE, read_config


def merged_model(args: LFArgs, tokenizer: Any) -> Any:
    """The model of model_name_or_path with the adapters of adapter_name_or_path in it, merged in float32 and then in the
    precision of the model's configuration. Raises ConfigError for what cannot be loaded."""
    from llamafactory.model import load_model

    try:
        model: Any = load_model(tokenizer, args.model, args.finetuning, is_trainable=False)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise ConfigError(f"adapter_name_or_path {args.model.adapter_name_or_path!r}: {first_line(error)}") from error
    dtype = read_config(args).dtype
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model
