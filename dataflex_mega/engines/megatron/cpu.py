"""Run megatron-core without CUDA. The one place where names of another package are replaced.

megatron-core asks `torch.cuda` for the current device, makes tensors with `device="cuda"` and keeps its random state in CUDA
generators. Where there is no CUDA, `cuda_calls_on_cpu` answers all of that with the CPU, for as long as it is entered; where
there is CUDA it does nothing.

Covered, as of megatron-core 0.16.1:
    torch.cuda.current_device, synchronize, empty_cache   layers, mappings, p2p communication, checkpoints
    torch.cuda.get_rng_state, manual_seed                 tensor_parallel/random.py
    _get_cuda_rng_state, _set_cuda_rng_state              tensor_parallel/random.py
    Tensor.cuda, factories and .to with a CUDA device     schedules, optimizer, gradient buffers, checkpoints
    factories with pin_memory=True                        rotary embeddings under context parallelism
    Tensor.type() == "torch.cuda.FloatTensor"             optimizer: which parameters it takes
    moe_utils.te_general_gemm                             a name that 0.16 leaves undefined without Transformer Engine
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_depth: list[None] = []  # one entry for each `cuda_calls_on_cpu` that is open


def is_needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


@contextlib.contextmanager
def cuda_calls_on_cpu() -> Iterator[None]:
    """Answer megatron-core's questions for CUDA with the CPU. May be entered within itself."""
    if not is_needed() or _depth:
        yield
        return
    from megatron.core.tensor_parallel import random as rng
    from megatron.core.transformer.moe import moe_utils

    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: CPU),
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "empty_cache", _nothing),
        (torch.cuda, "manual_seed", _manual_seed),
        (torch.cuda, "get_rng_state", lambda *_args, **_kwargs: torch.get_rng_state()),
        (rng, "_get_cuda_rng_state", lambda *_args, **_kwargs: torch.get_rng_state()),
        (rng, "_set_cuda_rng_state", lambda state, *_args, **_kwargs: torch.set_rng_state(state)),
    ]
    if not hasattr(moe_utils, "te_general_gemm"):
        replaced.append((moe_utils, "te_general_gemm", None))
    _depth.append(None)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, answer in replaced:
                stack.enter_context(mock.patch.object(owner, name, answer, create=True))
            stack.enter_context(_OnCpu())
            yield
    finally:
        _depth.pop()


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """In place of a wait for a device that does not exist."""


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


class _OnCpu(TorchFunctionMode):
    """Turns CUDA devices in the arguments of torch functions into the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        if func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )
