"""The parameters that training changes, by name: what a checkpoint holds of the model.

A quantised model is read by the names of its parameters, since torch's walk over its state dict comes upon buffers that are
attributes of a parameter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from dataflex_mega.engines.fsdp.parallel import unwrap
from dataflex_mega.engines.fsdp.quantized import is_quantized

# Frozen parameters come from the model itself at start-up; only what training changes is stored.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def model_state(module: nn.Module) -> dict[str, Any]:
    """What of the model is stored to resume, as it is laid out over processes."""
    if is_quantized(unwrap(module)):
        return _trained(unwrap(module))
    return get_model_state_dict(module, options=TRAINABLE_ONLY)


def set_model_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Restore what `model_state` returned; of a quantised model it holds the parameters themselves."""
    if not is_quantized(unwrap(module)):
        set_model_state_dict(module, state, options=TRAINABLE_ONLY)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model of this process alone that `save_pretrained` may write; of a quantised one what was trained, all
    that its adapter consists of."""
    return _trained(model) if is_quantized(model) else get_model_state_dict(model)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
