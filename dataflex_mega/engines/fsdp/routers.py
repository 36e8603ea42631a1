"""FSDPRouterCounter of Hugging Face models: which expert a token goes to, counted in the training forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.router_load import RouterLoadCounter, token_domains
from dataflex_mega.types import Batch

RECORDED = "router_logits"  # transformers' name, under which a model class says what its routers are
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


class FSDPRouterCounter:
    """All routers of a model, first layer first. Raises ConfigError for a model that has none."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.modules = find_routers(model)
        self.experts = next((int(n) for key in EXPERTS if (n := getattr(config, key, None))), 0)
        self.top_k = int(getattr(config, "num_experts_per_tok", 0) or 0)
        if not self.modules or not self.experts or not self.top_k:
            raise ConfigError(
                f"mixer: needs a mixture of experts, and {config.model_type} has no routers that transformers records"
            )

    def new_counter(self, num_domains: int, device: torch.device) -> RouterLoadCounter:
        """A counter of one step, all zero."""
        return RouterLoadCounter(len(self.modules), num_domains, self.experts, device)

    @contextmanager
    def counting(self, batch: Batch, sums: RouterLoadCounter) -> Iterator[None]:
        """Count a forward pass over `batch` inside. A pass that is repeated in the backward pass lies outside."""
        domain = token_domains(batch).flatten()
        handles = [
            module.register_forward_hook(self._forward_hook(layer, domain, sums))
            for layer, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward_hook(self, layer: int, domain: Tensor, sums: RouterLoadCounter) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            sums.add(layer, one_hot_experts(output, self.experts, self.top_k), domain)

        return hook


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers records `router_logits` from, in the order of the model."""
    kinds: list[tuple[type, str]] = []
    for module in model.modules():
        recorded = (getattr(module, "_can_record_outputs", None) or {}).get(RECORDED)
        entries = recorded if isinstance(recorded, list) else [recorded] if recorded is not None else []
        for one in entries:
            kinds.append((getattr(one, "target_class", one), getattr(one, "layer_name", None) or ""))
    return [
        module
        for name, module in model.named_modules()
        if any(isinstance(kind, type) and isinstance(module, kind) and at in name for kind, at in kinds)
    ]


def one_hot_experts(output: Any, experts: int, top_k: int) -> Tensor:
    """[t, E] float: a router's output, 1 where a token goes to an expert.

    Where the output has the indices of the chosen experts they are taken; else those of the largest logits.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    expert_ids = next(
        (p for p in outputs if torch.is_tensor(p) and not p.is_floating_point() and p.shape[-1] == top_k), None
    )
    if expert_ids is None:
        logits = next((p for p in outputs if torch.is_tensor(p) and p.shape[-1] == experts), None)
        if logits is None:
            raise ConfigError("mixer: the model's routers give neither numbers of experts nor a logit for each")
        expert_ids = logits.detach().topk(top_k, dim=-1).indices
    flat = expert_ids.reshape(-1, top_k)
    return torch.zeros(len(flat), experts, device=flat.device).scatter_(1, flat, 1.0)
