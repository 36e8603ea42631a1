"""Logits of the model that training is anchored to: a second model, or the one in training without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.types import Batch

DISABLED = "_disable_adapters"  # PEFT's flag of every layer that has an adapter beside what it was


def frozen_logits(runner: FSDPModelRunner, model: Any | None) -> Callable[[Batch], Tensor]:
    """What `FSDPModelRunner.reference` is. `model`: a second one, not yet parallel; None: the PEFT model of `runner`.

    A second model is laid out as the training model is where that is sharded, and whole on every process otherwise.
    """
    if model is None:
        return partial(_logits_without_adapter, runner)
    layout: FSDPLayout = runner.layout if runner.layout.mode == "fsdp2" else replace(runner.layout, mode="single")
    module = parallelize(model.requires_grad_(False), layout, runner.parallel_info).eval()
    return partial(_logits, runner, module)


def _logits(runner: FSDPModelRunner, module: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return runner.logits_of(module, batch)


def _logits_without_adapter(runner: FSDPModelRunner, batch: Batch) -> Tensor:
    """The wrapper of DistributedDataParallel is passed by: nothing of this pass is reduced."""
    with torch.no_grad(), runner.evaluation_mode(), adapters_disabled(runner.model):
        return runner.logits_of(runner.model, batch)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, layers of a PEFT model compute what they did before it had adapters.

    Unlike PEFT's own `disable_adapter` it leaves `requires_grad` alone, which FSDP2 reads when it first gathers a parameter.
    """
    enabled = [module for module in model.modules() if getattr(module, DISABLED, None) is False]
    for module in enabled:
        setattr(module, DISABLED, True)
    try:
        yield
    finally:
        for module in enabled:
            setattr(module, DISABLED, False)
