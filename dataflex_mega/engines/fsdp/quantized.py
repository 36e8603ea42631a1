"""A quantised base under LoRA: which modules hold packed numbers, and how their layout stays what it is.

A 4-bit weight is a tensor of bytes under some dtype, float32 or bfloat16 as well, so that it can be sharded; cast to another
dtype it is lost. Its scales (`quant_state`) are kept beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_quantized(model: Any) -> bool:
    """Whether transformers has loaded the model, or the base of an adapter, in quantised form."""
    return bool(getattr(model, "is_quantized", False))


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The linear layers with a 4-bit weight, in the order of the model."""
    return [module for module in model.modules() if hasattr(module._parameters.get("weight"), "quant_state")]


def keep_packed(model: nn.Module) -> None:
    """On CPUs with AVX512 bitsandbytes packs a weight anew in the first pass without gradients, for good, and then neither
    computes as before nor finds the shape that it expects of a shard. Say to it that the CPU is another one."""
    for module in packed_modules(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def float_unpacked(model: nn.Module) -> None:
    """`model.float()` for all but packed weights."""
    packed = {id(module.weight) for module in packed_modules(model)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and id(parameter) not in packed:
                parameter.data = parameter.data.float()
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


def move_scales(model: nn.Module, device: torch.device) -> None:
    """The scales of packed weights onto the device that computes; sharding moves the weights only."""
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and hasattr(state, "absmax"):
            state.to(device)
