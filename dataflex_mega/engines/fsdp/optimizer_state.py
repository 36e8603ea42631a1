"""An optimizer's state by the names of parameters: tensors and plain values, so that it can be stored and resharded.

torch's functions do so for optimizers whose state is tensors that are all there after the first step. Others keep objects
in it (GaLore's and APOLLO's projectors), or a mark for each parameter before the first step (Muon), so that torch would
take the state for complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dataflex_mega.engines.fsdp.parallel import unwrap
from dataflex_mega.engines.fsdp.trained_state import TRAINABLE_ONLY

PLAIN = (bool, int, float, str, bytes, type(None))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"state": {parameter: {key: value}}, ...}, nested dicts of tensors and plain values."""
    if _is_torchs(optimizer):
        return get_optimizer_state_dict(module, optimizer, options=TRAINABLE_ONLY)
    if not any("step" in state or len(state) > 1 for state in optimizer.state.values()):
        _step_without_effect(optimizer)
    state = {
        name: _to_plain(optimizer.state[parameter])
        for name, parameter in _trained(module)
        if optimizer.state.get(parameter)
    }
    return {"state": state, "groups": {str(number): _settings(group) for number, group in _groups(optimizer)}}


def set_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore what `optimizer_state` returned, with the values that were read."""
    if _is_torchs(optimizer):
        set_optimizer_state_dict(module, optimizer, state, options=TRAINABLE_ONLY)
        return
    for name, parameter in _trained(module):
        if name in state["state"]:
            _restore(optimizer.state[parameter].__setitem__, optimizer.state[parameter], state["state"][name])
    for number, group in _groups(optimizer):
        group.update(state["groups"][str(number)])


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _groups(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    return enumerate(optimizer.param_groups)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The rate, which a schedule changes, and what an optimizer keeps of a whole group, such as a count of steps."""
    return {key: value for key, value in group.items() if key != "params" and _is_plain(value)}


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in unwrap(module).named_parameters() if p.requires_grad)


def _step_without_effect(optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients and a rate of zero makes the state of every parameter, as torch does it for its own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def _to_plain(values: dict[str, Any]) -> dict[str, Any]:
    """An object becomes the dict of its attributes."""
    return {key: value if _is_plain(value) else _to_plain(vars(value)) for key, value in values.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (Tensor, *PLAIN))


def _restore(put: Callable[[str, Any], Any], present: dict[str, Any], stored: dict[str, Any]) -> None:
    """Put stored values in the places of present ones; tensors and plain values as they are, the others' attributes."""
    for key, value in stored.items():
        if isinstance(value, dict):
            inner = present[key]
            _restore(lambda name, new, inner=inner: setattr(inner, name, new), vars(inner), value)
        else:
            put(key, value)
