"""Exact inner products of per-sample gradients with target directions, without ever holding a per-sample gradient.

LESS (Xia et al. 2024, arXiv 2402.04333) scores a candidate i by mean_v cos(G_i, g_v) over target samples v, with G_i its
Adam-preconditioned gradient. With the direction U = mean_v g_v / |g_v| this is <G_i, U> / |G_i|, so one direction a group of
targets replaces the stored features of all candidates, and no random projection is needed.

For a linear layer y = a W^T the gradient of sample i is the sum over its positions of (dL/dy_t) a_t^T. Hooks keep the input
a and, when the backward pass brings dL/dy, form that sum in tiles, apply Adam element by element, and add the tile's dot
products and squared norm to the sample's. Weight gradients are never computed: the backward pass is asked only for the
gradient of the embeddings' output. On a GPU signals/kernels.py does the same with fewer passes.

Counted are the weights of linear layers that train, LoRA's included. Embeddings, norms and biases are left out, as usual
for gradient-based selection; a weight tied to the embedding counts by its use as output layer alone, in candidates as in
targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dataflex_mega.errors import TrainingFault

TILE = 1 << 18  # elements of a gradient tile: 1 MB of float32, which stays in a core's cache
GPU_TILE = 1 << 24  # there the cost of starting an operation counts for more
HALF = (torch.bfloat16, torch.float16)


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

    def constants(self) -> tuple[float, float, float, float, float]:
        """(a, b, gain, share, floor): the update is (a m + gain g) / (sqrt(b v + share g^2) + floor)."""
        b1, b2 = self.betas
        t = self.step + 1
        scale = (1 - b2**t) ** 0.5  # with c = 1 - b1^t the update is (scale / c) m' / (sqrt(v') + scale eps)
        factor = scale / (1 - b1**t)
        return b1 * factor, b2, (1 - b1) * factor, 1 - b2, scale * self.eps

    def rows(self, rows: slice) -> Tile:
        """What the update of some rows of the weight needs, once for all samples."""
        keep_first, keep_second, gain, share, floor = self.constants()
        return Tile(wide(self.first[rows]) * keep_first, wide(self.second[rows]) * keep_second, gain, share, floor)

    def update(self, gradient: Tensor) -> Tensor:
        """[..., d_out, d_in] gradients -> updates of the same shape."""
        return self.rows(slice(None)).update(gradient)


@dataclass(frozen=True)
class Tile:
    """update = (first + gain g) / (sqrt(second + share g^2) + floor)."""

    first: Tensor
    second: Tensor
    gain: float
    share: float
    floor: float

    def update(self, gradient: Tensor) -> Tensor:
        """Gradients that broadcast with the moments -> updates."""
        root = torch.addcmul(self.second, gradient, gradient, value=self.share).sqrt_().add_(self.floor)
        return torch.add(self.first, gradient, alpha=self.gain).div_(root)


@dataclass
class Layer:
    """A linear layer's side of the contraction. `directions` and `adam` are asked for when they are needed, and dropped."""

    directions: Callable[[], Tensor] | None  # -> [S, d_out, d_in] float32; None: norms only
    adam: Callable[[], Adam] | None = None  # None: plain gradients


@dataclass
class Sums:
    """Per sample of a batch, over all layers seen so far."""

    dot: Tensor  # [n, S]
    norm2: Tensor  # [n]

    @staticmethod
    def zeros(samples: int, directions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Sums:
        """Nothing seen yet."""
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        return Sums(torch.zeros(samples, directions, **options), torch.zeros(samples, **options))


@dataclass(frozen=True)
class Span:
    """Positions start..stop-1 of a row belong to a sample."""

    sample: int
    row: int
    start: int
    stop: int


def spans(segment: Tensor) -> list[Span]:
    """[b, S] index of the sample at each position, -1 on padding -> one span for each run of a sample."""
    found = []
    for row, values in enumerate(segment.cpu()):
        kept, lengths = torch.unique_consecutive(values, return_counts=True)
        stops = lengths.cumsum(0).tolist()
        for sample, stop, length in zip(kept.tolist(), stops, lengths.tolist(), strict=True):
            if sample >= 0:
                found.append(Span(sample, row, stop - length, stop))
    return found


def wide(tensor: Tensor) -> Tensor:
    """In the precision of sums: float32, or float64 where that is what the model computes in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def add_layer(sums: Sums, layer: Layer, inputs: Tensor, grads: Tensor, where: Sequence[Span] | None = None) -> None:
    """Add one layer's part: [b, T, d_in] inputs, [b, T, d_out] gradients of its outputs.

    `where`: the spans of samples, at most one a sample; without it every row is a sample of its own.
    """
    on_gpu = inputs.device.type == "cuda"
    if not (on_gpu and inputs.dtype == grads.dtype and inputs.dtype in HALF):
        inputs, grads = wide(inputs), wide(grads)
    if where is None:
        where = rows_of(inputs)
    directions = wide(layer.directions()) if layer.directions is not None else None
    adam = layer.adam() if layer.adam is not None else None
    d_in, d_out = inputs.shape[-1], grads.shape[-1]
    rows = max(1, min(d_out, (GPU_TILE if on_gpu else TILE) // d_in))
    for first in range(0, d_out, rows):
        part = slice(first, min(first + rows, d_out))
        here = None if directions is None else directions[:, part].flatten(1).t()  # [rows * d_in, S]
        moments = None if adam is None else adam.rows(part)
        for span in where:
            cut = slice(span.start, span.stop)
            tile = product(grads[span.row, cut, part].t(), inputs[span.row, cut])  # [rows, d_in]
            if moments is not None:
                tile = moments.update(tile)
            flat = tile.flatten()
            sums.norm2[span.sample] += flat.dot(flat)
            if here is not None:
                sums.dot[span.sample] += flat @ here


def rows_of(inputs: Tensor) -> list[Span]:
    """The spans of [b, T, ...] inputs when every row is a sample."""
    return [Span(row, row, 0, inputs.shape[1]) for row in range(len(inputs))]


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product, of half-precision factors too, with float32 or float64 sums that are not rounded afterwards."""
    if left.dtype in HALF:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


class Plain:
    """The sums of one batch with torch's own operations."""

    def __init__(self, sums: Sums, where: Sequence[Span] | None) -> None:
        self.sums, self.where = sums, where

    def add(self, layer: Layer, inputs: Tensor, grads: Tensor) -> None:
        """See `add_layer`."""
        add_layer(self.sums, layer, inputs, grads, self.where)

    def finish(self) -> None:
        """`sums` are up to date after every layer."""


@dataclass
class Taps:
    """Hooks on the linear layers of a model. Inside `listening` a backward pass adds to sums, which are ready after it."""

    modules: dict[str, nn.Linear]
    layers: dict[str, Layer]
    make: Any = Plain  # what adds a batch up, or kernels.Fused; see signals.capability
    adder: Any = field(default=None, init=False)
    latest: tuple[Tensor, Tensor] | None = field(default=None, init=False)  # see `_as_multiplied`

    @contextmanager
    def listening(
        self,
        samples: int,
        directions: int,
        device: torch.device,
        where: Sequence[Span] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Sums]:
        """Collect over one forward and backward pass of a batch; `where`: see `add_layer`."""
        sums = Sums.zeros(samples, directions, device, dtype)
        self.adder = (Plain if dtype == torch.float64 else self.make)(sums, where)
        handles = [module.register_forward_hook(self._tap(name)) for name, module in self.modules.items()]
        try:
            yield sums
            self.adder.finish()
        finally:
            for handle in handles:
                handle.remove()
            self.adder = self.latest = None

    def _tap(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first of two forward passes under activation checkpointing
                return
            inputs = self._as_multiplied(args[0], output.dtype)
            output.register_hook(lambda grad: self._add(name, inputs, grad))

        return after_forward

    def _as_multiplied(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs as the layer multiplied them: under autocast, in half precision. Layers that follow each other with the
        same inputs, like those of queries, keys and values, share what is kept for the backward pass."""
        if inputs.dtype == dtype:
            return inputs.detach()
        if self.latest is None or self.latest[0] is not inputs:
            self.latest = (inputs, inputs.detach().to(dtype))
        return self.latest[1]

    def _add(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        if inputs.dim() != 3:
            raise TrainingFault(
                f"gradient scores: the input of {name} has shape {tuple(inputs.shape)}, which does not tell samples apart"
            )
        with torch.no_grad():
            self.adder.add(self.layers[name], inputs, grad.detach())


def trained_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose weight trains, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
