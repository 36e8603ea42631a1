"""Which implementation of gradient scores a device gets: the Triton kernel or torch's own operations, and why."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.signals.per_sample_gradients import TorchAccumulator

VARIABLE = "DATAFLEX_GRADIENT_KERNEL"
VALUES = ("auto", "torch", "triton")
CAPABILITY = (8, 0)  # the first with matrix units for bf16


@dataclass(frozen=True)
class KernelChoice:
    """Which implementation is used, and one line for the log that says why."""

    uses_triton: bool
    message: str

    @property
    def accumulator_class(self) -> Any:
        """What GradientHooks accumulate with: per_sample_gradients.TorchAccumulator or kernels.TritonAccumulator."""
        if not self.uses_triton:
            return TorchAccumulator
        from dataflex_mega.signals.kernels import TritonAccumulator  # needs Triton

        return TritonAccumulator


def choose_kernel(device: torch.device) -> KernelChoice:
    """Choose the implementation for a device.

    The environment variable DATAFLEX_GRADIENT_KERNEL decides: `auto` (the default) takes the kernel where it can run,
    `torch` never, `triton` always. Raises ConfigError for another value, and for `triton` where the kernel cannot run.
    """
    requested = os.environ.get(VARIABLE, "auto")
    if requested not in VALUES:
        hint = did_you_mean(requested, VALUES)
        raise ConfigError(f"{VARIABLE}: {requested!r} is not known{hint}; {', '.join(VALUES)}")
    if requested == "torch":
        return KernelChoice(False, f"gradient scores: torch operations, as {VARIABLE} says")
    reason = unavailable_reason(device)
    if reason is None:
        return KernelChoice(True, f"gradient scores: Triton kernel on {torch.cuda.get_device_name(device)}")
    if requested == "triton":
        raise ConfigError(f"{VARIABLE}: triton is requested, but {reason}")
    return KernelChoice(False, f"gradient scores: torch operations, as {reason}")


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the kernel needs a GPU and the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"the kernel needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and the GPU has {major}.{minor}"
    return None
