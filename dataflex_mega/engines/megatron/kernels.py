"""Optional kernel libraries: used where they are installed; `used_libraries` says which."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def transformer_engine() -> bool:
    """Whether Transformer Engine can be imported."""
    return importlib.util.find_spec("transformer_engine") is not None and _imports("transformer_engine.pytorch")


def nvidia_apex() -> bool:
    """Whether NVIDIA Apex is installed. PyPI has a web toolkit of that name, so one of its classes is looked for."""
    return importlib.util.find_spec("apex") is not None and _has("apex.optimizers", "FusedAdam")


def fused_rms_norm() -> Callable[..., Any] | None:
    """NVIDIA Apex's RMSNorm (values, weight, shape, eps), or None."""
    if not nvidia_apex() or not _has("apex.normalization.fused_layer_norm", "fused_rms_norm_affine"):
        return None
    return importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine


def gradient_accumulation() -> bool:
    """Whether Apex's kernel that adds a weight's gradient to its buffer is installed, and a device to run it."""
    return torch.cuda.is_available() and _has("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32")


def used_libraries() -> dict[str, bool]:
    """Library -> whether it is used."""
    return {"Transformer Engine": transformer_engine(), "NVIDIA Apex": nvidia_apex()}


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, OSError):  # OSError: a binary built for another CUDA
        return False
    return True


def _has(module: str, name: str) -> bool:
    return _imports(module) and hasattr(importlib.import_module(module), name)
