"""Exact inner products of per-sample gradients with target directions, without ever holding a per-sample gradient.

LESS (Xia et al. 2024, arXiv 2402.04333) scores a candidate i by mean_v cos(G_i, g_v) over target samples v, with G_i its
Adam-preconditioned gradient. With the direction U = mean_v g_v / |g_v| this is <G_i, U> / |G_i|, so one direction a group of
targets replaces the stored features of all candidates, and no random projection is needed.

For a linear layer y = a W^T the gradient of sample i is the sum over its positions of (dL/dy_t) a_t^T. Hooks keep the input
a and, when the backward pass brings dL/dy, form that sum in tiles, apply Adam element by element, and add the tile's dot
products and squared norm to the sample's. Weight gradients are never computed: the backward pass is asked only for the
gradient of the embeddings' output.

Counted are the weights of linear layers that train, LoRA's included. Embeddings, norms and biases are left out, as usual
for gradient-based selection; a weight tied to the embedding counts by its use as output layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TILE = 1 << 18  # elements of a gradient tile: 1 MB of float32, which stays in a core's cache


@dataclass(frozen=True)
class Adam:
    """What turns a gradient into Adam's update: moments of one weight and the optimizer's constants.

    The update is that of `torch.optim.Adam` for the step after `step`, with the learning rate left out:
    m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps), where m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2, t = step + 1.
    """

    first: Tensor  # [d_out, d_in] m
    second: Tensor  # [d_out, d_in] v
    step: int
    betas: tuple[float, float]
    eps: float

    def rows(self, rows: slice) -> Adam:
        """The same for some rows of the weight."""
        return Adam(self.first[rows], self.second[rows], self.step, self.betas, self.eps)

    def update(self, gradient: Tensor) -> Tensor:
        """[n, rows, d_in] gradients -> updates of the same shape."""
        b1, b2 = self.betas
        t = self.step + 1
        scale = (1 - b2**t) ** 0.5  # sqrt(v'/c) = sqrt(v')/sqrt(c), folded into the constants below
        root = torch.addcmul(b2 * self.second, gradient, gradient, value=1 - b2).sqrt_().div_(scale).add_(self.eps)
        return torch.add(b1 * self.first, gradient, alpha=1 - b1).div_(root).div_(1 - b1**t)


@dataclass
class Layer:
    """A linear layer's side of the contraction. `directions` and `adam` are asked for when they are needed, and dropped."""

    directions: Callable[[], Tensor] | None  # -> [S, d_out, d_in] float32; None: norms only
    adam: Callable[[], Adam] | None = None  # None: plain gradients


@dataclass
class Sums:
    """Per sample of a batch, over all layers seen so far."""

    dot: Tensor  # [n, S] float32
    norm2: Tensor  # [n] float32


def add_layer(sums: Sums, layer: Layer, inputs: Tensor, grads: Tensor) -> None:
    """Add one layer's part: [n, T, d_in] inputs, [n, T, d_out] gradients of its outputs, one sample a row."""
    inputs, grads = inputs.flatten(1, -2).float(), grads.flatten(1, -2).float()
    directions = layer.directions() if layer.directions is not None else None
    adam = layer.adam() if layer.adam is not None else None
    d_in, d_out = inputs.shape[-1], grads.shape[-1]
    rows = max(1, min(d_out, TILE // d_in))
    for first in range(0, d_out, rows):
        part = slice(first, min(first + rows, d_out))
        here = None if directions is None else directions[:, part].flatten(1).t()  # [rows * d_in, S]
        moments = None if adam is None else adam.rows(part)
        for sample in range(len(inputs)):
            tile = torch.mm(grads[sample, :, part].t(), inputs[sample])  # [rows, d_in]
            if moments is not None:
                tile = moments.update(tile)
            flat = tile.flatten()
            sums.norm2[sample] += flat.dot(flat)
            if here is not None:
                sums.dot[sample] += flat @ here


@dataclass
class Taps:
    """Hooks on the linear layers of a model. Inside `listening` a backward pass adds to `sums`."""

    modules: dict[str, nn.Linear]
    layers: dict[str, Layer]
    sums: Sums | None = field(default=None, init=False)

    @contextmanager
    def listening(self, samples: int, directions: int, device: torch.device) -> Iterator[Sums]:
        """Collect over one forward and backward pass of a batch with one sample a row."""
        self.sums = Sums(torch.zeros(samples, directions, device=device), torch.zeros(samples, device=device))
        handles = [module.register_forward_hook(self._tap(name)) for name, module in self.modules.items()]
        try:
            yield self.sums
        finally:
            for handle in handles:
                handle.remove()
            self.sums = None

    def _tap(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first of two forward passes under activation checkpointing
                return
            inputs = args[0].detach()
            output.register_hook(lambda grad: self._add(name, inputs, grad))

        return after_forward

    def _add(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        assert self.sums is not None
        with torch.no_grad():
            add_layer(self.sums, self.layers[name], inputs, grad.detach())


def trained_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose weight trains, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
