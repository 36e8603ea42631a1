"""Projected gradient features of each sample of a batch, from hooks on linear layers; see signals.projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega.errors import TrainingFault
from dataflex_mega.signals.projection import DenseProjection, TwoSidedProjection
from dataflex_mega.types import ProjectionSpec

Projection = TwoSidedProjection | DenseProjection


def make_projections(spec: ProjectionSpec, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Projection]:
    """Weights' names and shapes -> the projection of each."""
    projection_class = TwoSidedProjection if spec.kind == "two_sided" else DenseProjection
    return {name: projection_class(name, shape, spec.size, spec.seed) for name, shape in shapes.items()}


def feature_dim(spec: ProjectionSpec, projections: Mapping[str, Projection]) -> int:
    """Numbers per sample: two-sided features of layers are concatenated, dense ones summed."""
    return sum(projection.width for projection in projections.values()) if spec.kind == "two_sided" else spec.size


class ProjectionHooks:
    """Hooks on the linear layers of a model. Inside `recording` a backward pass fills the features."""

    def __init__(
        self, modules: Mapping[str, nn.Linear], projections: Mapping[str, Projection], spec: ProjectionSpec
    ) -> None:
        self.modules, self.projections, self.spec = modules, projections, spec
        self._columns: dict[str, slice] = {}  # of each layer's features
        first = 0
        for name, projection in projections.items():
            self._columns[name] = slice(first, first + projection.width)
            first += projection.width if spec.kind == "two_sided" else 0
        self._features: Tensor | None = None
        self._plain = False

    @contextmanager
    def recording(self, num_samples: int, plain: bool, device: torch.device) -> Iterator[Tensor]:
        """Over one forward and backward pass of a batch, one sample per row -> [num_samples, width], complete at the end.

        `plain`: features of the gradient itself, whatever preconditions the projections.
        """
        weight = next(iter(self.modules.values())).weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._features = torch.zeros(num_samples, feature_dim(self.spec, self.projections), device=device, dtype=dtype)
        self._plain = plain
        handles = [module.register_forward_hook(self._forward_hook(name)) for name, module in self.modules.items()]
        try:
            yield self._features
        finally:
            for handle in handles:
                handle.remove()
            self._features = None

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first of two forward passes under activation checkpointing
                return
            inputs = args[0].detach()
            output.register_hook(lambda grad: self._add(name, inputs, grad.detach()))

        return after_forward

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor, grads: Tensor) -> None:
        assert self._features is not None
        if inputs.dim() != 3 or len(inputs) != len(self._features):
            raise TrainingFault(
                f"gradient features: {name} does not see one sample per row (input {list(inputs.shape)})"
            )
        dtype = self._features.dtype
        features = self.projections[name].features(inputs.to(dtype), grads.to(dtype), self._plain)
        self._features[:, self._columns[name]] += features
