"""What a process uses of its machine: memory, and the share of a GPU's arithmetic (MFU) where its peak is known."""

from __future__ import annotations

import resource
from typing import Any

import torch

GIB = 2**30
# Part of torch.cuda.get_device_name -> dense bf16 or fp16 operations a second, from the vendors' data sheets. The first that
# is contained counts.
PEAK_FLOPS = {
    "B200": 2.25e15, "H200": 9.89e14, "H100 PCIe": 7.56e14, "H100 NVL": 8.35e14, "H100": 9.89e14, "H800": 9.89e14,
    "H20": 1.48e14, "A100": 3.12e14, "A800": 3.12e14, "L40S": 3.62e14, "L40": 1.81e14, "L4": 1.21e14, "A10": 1.25e14,
    "V100": 1.25e14, "T4": 6.5e13, "RTX 4090": 1.65e14,
}  # fmt: skip


def memory() -> dict[str, float]:
    """Peaks of this process in GiB: resident memory, and on a GPU what torch has allocated and reserved."""
    figures = {"memory/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        figures["memory/peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        figures["memory/peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return figures


def peak_flops(device_name: str) -> float | None:
    """Of one GPU with 16-bit numbers; None for one that is not in the table."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)


def flops_per_token(model: Any) -> float | None:
    """Of a step, by 2 operations for each parameter and token in each of forward pass, gradients of activations, and
    gradients of those parameters that are trained; embeddings and attention scores are left out.

    None for a model that does not count its parameters, as those of Megatron, of which a process has a part only.
    """
    count = getattr(model, "num_parameters", None)
    if count is None:
        return None
    return 4.0 * count(exclude_embeddings=True) + 2.0 * count(only_trainable=True, exclude_embeddings=True)


def mfu_per_token_rate(model: Any, half_precision: bool, world_size: int) -> float | None:
    """What tokens a second of the whole job are to be multiplied by; None where it is not known."""
    if not (half_precision and torch.cuda.is_available()):
        return None
    peak, work = peak_flops(torch.cuda.get_device_name()), flops_per_token(model)
    return None if peak is None or work is None else work / (peak * world_size)
