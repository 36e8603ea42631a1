"""Gradients of single experts where transformers keeps all experts of a layer in one parameter.

`gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] hold all experts of a layer, so there is no linear layer to hook. While
gradient scores are recorded, such a module's forward is the plain loop over its experts, each product a layer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataflex_mega.signals.per_sample_gradients import DotAndNormSums, LayerOperands, accumulate_layer, sample_spans

WEIGHTS = ("gate_up_proj", "down_proj")


def trained_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of all experts of a layer whose weights train, by name: those with a gate and without biases."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def _is_experts(module: nn.Module) -> bool:
    weights = [getattr(module, name, None) for name in WEIGHTS]
    if not all(isinstance(weight, nn.Parameter) and weight.dim() == 3 and weight.requires_grad for weight in weights):
        return False
    plain = not getattr(module, "is_transposed", False) and not getattr(module, "has_bias", False)
    return plain and hasattr(module, "act_fn")


@dataclass
class ExpertGradientHooks:
    """Adds the gradients of experts to the sums of a pass."""

    modules: dict[str, nn.Module]
    layer: Callable[[str, int], LayerOperands]  # (parameter's name, expert) -> its side of the contraction
    sums: DotAndNormSums | None = field(default=None, init=False)
    samples: Tensor | None = field(default=None, init=False)

    @contextmanager
    def recording(self, segment_ids: Tensor, sums: DotAndNormSums) -> Iterator[None]:
        """Collect over one forward and backward pass of a batch with [b, S] `segment_ids`."""
        self.sums, self.samples = sums, segment_ids.flatten()
        for name, module in self.modules.items():
            module.forward = self._loop(name, module)  # type: ignore[method-assign]  # of this instance
        try:
            yield
        finally:
            for module in self.modules.values():
                del module.forward
            self.sums = self.samples = None

    def _loop(self, name: str, module: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def forward(hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
            """[tokens, H], [tokens, k] experts of each token and their weights -> [tokens, H]. Experts without a token
            run too: their parameters are gathered by all ranks alike."""
            assert self.samples is not None
            total = torch.zeros_like(hidden)
            for expert in range(len(module.down_proj)):
                token, choice = torch.where(expert_ids == expert)
                rows = self.samples[token]
                both = self._linear(f"{name}.{WEIGHTS[0]}", expert, hidden[token], module.gate_up_proj, rows)
                gate, up = both.chunk(2, dim=-1)
                out = self._linear(f"{name}.{WEIGHTS[1]}", expert, module.act_fn(gate) * up, module.down_proj, rows)
                total.index_add_(0, token, (out * weights[token, choice, None]).to(total.dtype))
            return total

        return forward

    def _linear(self, name: str, expert: int, inputs: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        output = F.linear(inputs, weight[expert])
        if output.requires_grad:
            detached = inputs.detach()
            output.register_hook(lambda grad: self._add(self.layer(name, expert), detached, grad.detach(), rows))
        return output

    @torch.no_grad()
    def _add(self, layer: LayerOperands, inputs: Tensor, grads: Tensor, rows: Tensor) -> None:
        """[r, d_in], [r, d_out], [r] the sample of each row."""
        assert self.sums is not None
        order = torch.argsort(rows, stable=True)
        accumulate_layer(
            self.sums,
            layer,
            inputs[order].unsqueeze(0),
            grads[order].unsqueeze(0),
            sample_spans(rows[order].unsqueeze(0)),
        )
