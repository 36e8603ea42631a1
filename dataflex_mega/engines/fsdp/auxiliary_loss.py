"""The load-balancing loss of a mixture of experts, by the model's own function of its routers' outputs.

A Hugging Face model computes it with its logits, but where samples share a row it cannot tell padding from tokens. So the
outputs are recorded where transformers would record them, and the function gets a mask that can.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dataflex_mega.engines.fsdp.routers import RECORDED
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Batch

FUNCTION = "load_balancing_loss_func"  # transformers' name in the module of every model that has such a loss


class AuxiliaryLoss:
    """Of a Hugging Face or PEFT model, whose configuration need not ask for the routers' outputs then: a model that is saved
    with such a configuration cannot generate. Raises ConfigError for a model without such a loss."""

    def __init__(self, model: Any) -> None:
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        functions = (getattr(sys.modules.get(cls.__module__), FUNCTION, None) for cls in type(model).__mro__)
        self.function = next(
            (function for function in functions if function is not None), None
        )  # FSDP2 makes a subclass
        self.num_experts = getattr(model, "num_experts", None)
        self.top_k = getattr(model, "num_experts_per_tok", None)
        self.routers = recorded_modules(model)
        if self.function is None or not self.num_experts or not self.top_k or not self.routers:
            raise ConfigError(
                f"moe_aux_loss_coef: a {model.config.model_type} has no load-balancing loss; leave the key out"
            )
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """The outputs of all routers in a forward pass inside, in their order."""
        outputs: list[Tensor] = []

        def hook(index: int) -> Any:
            def record(_module: nn.Module, _args: Any, output: Any) -> None:
                outputs.append(output[index] if isinstance(output, tuple) else output)

            return record

        handles = [module.register_forward_hook(hook(index)) for module, index in self.routers]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()  # before the backward pass, where layers may be recomputed

    def loss(self, outputs: list[Tensor], batch: Batch) -> Tensor:
        """Of the batch that `outputs` were recorded of, without its padding: a differentiable scalar."""
        assert self.function is not None
        flat = tuple(output.flatten(0, -2) for output in outputs)
        return self.function(flat, self.num_experts, self.top_k, (batch.segment_ids >= 0).long()).float()


def recorded_modules(model: nn.Module) -> list[tuple[nn.Module, int]]:
    """(module, place in the tuple that it returns) of everything that transformers records as router logits."""
    found = []
    for owner in model.modules():
        recorded = (getattr(owner, "_can_record_outputs", None) or {}).get(RECORDED)
        for entry in recorded if isinstance(recorded, list) else [recorded] if recorded is not None else []:
            kind = getattr(entry, "target_class", entry)
            place, index = getattr(entry, "layer_name", None) or "", getattr(entry, "index", 1)
            found += [
                (module, index)
                for name, module in owner.named_modules()
                if isinstance(kind, type) and isinstance(module, kind) and place in name
            ]
    unique = {id(module): (module, index) for module, index in found}
    return list(unique.values())
