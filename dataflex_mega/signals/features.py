"""Projected gradient features of every sample of a batch, from hooks on linear layers; see signals.projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega.errors import TrainingFault
from dataflex_mega.signals.projection import Dense, TwoSided
from dataflex_mega.types import FeatureSpec


def projections(spec: FeatureSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TwoSided | Dense]:
    """Weights' names and shapes -> the projection of each."""
    kind = TwoSided if spec.kind == "two_sided" else Dense
    return {name: kind(name, shape, spec.size, spec.seed) for name, shape in shapes.items()}


def total_width(spec: FeatureSpec, made: Mapping[str, TwoSided | Dense]) -> int:
    """Numbers a sample: layers side by side when each is projected by itself, one on top of the other when all are."""
    return sum(layer.width for layer in made.values()) if spec.kind == "two_sided" else spec.size


class FeatureTaps:
    """Hooks on the linear layers of a model. Inside `listening` a backward pass fills the features."""

    def __init__(
        self, modules: Mapping[str, nn.Linear], made: Mapping[str, TwoSided | Dense], spec: FeatureSpec
    ) -> None:
        self.modules, self.made, self.spec = modules, made, spec
        self._places: dict[str, slice] = {}
        first = 0
        for name, layer in made.items():
            self._places[name] = slice(first, first + layer.width)
            first += layer.width if spec.kind == "two_sided" else 0
        self._found: Tensor | None = None
        self._plain = False

    @contextmanager
    def listening(self, samples: int, plain: bool, device: torch.device) -> Iterator[Tensor]:
        """Over one forward and backward pass of a batch with one sample a row -> [samples, width], filled at the end."""
        first = next(iter(self.modules.values())).weight
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self._found, self._plain = (
            torch.zeros(samples, total_width(self.spec, self.made), device=device, dtype=dtype),
            plain,
        )
        handles = [module.register_forward_hook(self._tap(name)) for name, module in self.modules.items()]
        try:
            yield self._found
        finally:
            for handle in handles:
                handle.remove()
            self._found = None

    def _tap(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first of two forward passes under activation checkpointing
                return
            inputs = args[0].detach()
            output.register_hook(lambda grad: self._add(name, inputs, grad.detach()))

        return after_forward

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        assert self._found is not None
        if inputs.dim() != 3 or len(inputs) != len(self._found):
            raise TrainingFault(f"gradient features: {name} does not see one sample a row (input {list(inputs.shape)})")
        kind = self._found.dtype
        self._found[:, self._places[name]] += self.made[name].features(inputs.to(kind), grads.to(kind), self._plain)
