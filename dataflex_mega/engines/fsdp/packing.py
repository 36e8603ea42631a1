"""Whether a model keeps the samples of a packed row apart, tried on a few tokens before training.

Not every architecture takes a mask for each pair of positions, and of those that do, some have other ways from one token
to the next (a recurrent state, a convolution). Two samples in a row tell: the second must have the losses that it has
beside any other sample, and those that it has alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import IGNORE_INDEX, Batch

TOKENS = 24  # of a sample
# Largest mean difference of token losses: beside another sample, and alone, where other kernels may run.
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 5e-2), "fp16": (1e-2, 5e-2)}
REFUSALS = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, NotImplementedError, AssertionError)


def check_packing(runner: FSDPModelRunner, cutoff_len: int) -> None:
    """Raises ConfigError with the architecture when it does not; every rank calls it. No random number is drawn."""
    length = max(2, min(TOKENS, cutoff_len // 2))
    config: Any = runner.model.config.get_text_config()
    first, second, other = (_tokens(length, config.vocab_size, start) for start in (1, 2, 3))
    try:
        alone = _losses(runner, [second])
        packed, beside_other = (_losses(runner, [neighbour, second])[length:] for neighbour in (first, other))
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(
            _message(config, f"it takes no mask of pairs of positions ({lines[0] if lines else ''})")
        ) from error
    finally:
        runner.reshard()
    leak, change = TOLERANCE[runner.layout.precision]
    if float((packed - beside_other).abs().mean()) > leak:
        raise ConfigError(_message(config, "a sample sees the one before it in its row"))
    if float((packed - alone).abs().mean()) > change:
        raise ConfigError(_message(config, "a sample has other losses in a packed row than alone"))


def _message(config: Any, reason: str) -> str:
    return f"packing: model type {config.model_type!r} cannot keep packed samples apart: {reason}; use packing: false"


def _tokens(length: int, vocabulary: int, start: int) -> Tensor:
    return (torch.arange(length) * 7919 + start * 104729) % vocabulary


def _losses(runner: FSDPModelRunner, samples: list[Tensor]) -> Tensor:
    """[S] token losses of samples that share a row, without dropout."""
    length = len(samples[0])
    labels = torch.stack([torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])]) for ids in samples])
    numbers = torch.arange(len(samples))
    batch = Batch(
        input_ids=torch.cat(samples).unsqueeze(0),
        labels=labels.view(1, -1),
        segment_ids=numbers.repeat_interleave(length).unsqueeze(0),
        position_ids=torch.arange(length).repeat(len(samples)).unsqueeze(0),
        sample_ids=numbers,
        domain_ids=torch.zeros_like(numbers),
        is_packed=len(samples) > 1,
    )
    with torch.no_grad(), runner.evaluation_mode():
        return runner.token_losses(batch.to(runner.device))[0]
