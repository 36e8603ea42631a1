"""Which implementation of gradient scores a device gets: the Triton kernel or torch's own operations, and why."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch

from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.signals.gradients import Plain

VARIABLE = "DATAFLEX_GRADIENT_KERNEL"
VALUES = ("auto", "torch", "triton")
CAPABILITY = (8, 0)  # the first with matrix units for bf16


@dataclass(frozen=True)
class Choice:
    """What is used, and one line that says so."""

    fused: bool
    line: str

    @property
    def adder(self) -> Any:
        """For Taps: a class with the use of signals.gradients.Plain."""
        if not self.fused:
            return Plain
        from dataflex_mega.signals.kernels import Fused  # needs Triton

        return Fused


def choose(device: torch.device) -> Choice:
    """The implementation for a device.

    The environment variable DATAFLEX_GRADIENT_KERNEL decides: `auto` (the default) takes the kernel where it can run,
    `torch` never, `triton` always. Raises ConfigError for another value, and for `triton` where the kernel cannot run.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in VALUES:
        raise ConfigError(f"{VARIABLE}: {wanted!r} is not known{did_you_mean(wanted, VALUES)}; {', '.join(VALUES)}")
    if wanted == "torch":
        return Choice(False, f"gradient scores: torch operations, as {VARIABLE} says")
    missing = obstacle(device)
    if missing is None:
        return Choice(True, f"gradient scores: Triton kernel on {torch.cuda.get_device_name(device)}")
    if wanted == "triton":
        raise ConfigError(f"{VARIABLE}: triton is asked for, but {missing}")
    return Choice(False, f"gradient scores: torch operations, as {missing}")


def obstacle(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"the kernel needs a GPU and the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return (
            f"the kernel needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and the GPU has {found[0]}.{found[1]}"
        )
    return None
