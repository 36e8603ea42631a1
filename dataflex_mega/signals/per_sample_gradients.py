"""Exact inner products of per-sample gradients with target directions, without ever holding a per-sample gradient.

LESS (Xia et al. 2024, arXiv 2402.04333) scores a candidate i by mean_v cos(G_i, g_v) over target samples v, with G_i its
Adam-preconditioned gradient. With the direction U = mean_v g_v / |g_v| this is <G_i, U> / |G_i|, so one direction per
group of targets replaces the stored features of all candidates, and no random projection is needed.

For a linear layer y = a W^T the gradient of sample i is the sum over its positions of (dL/dy_t) a_t^T. Hooks keep the input
a and, when the backward pass brings dL/dy, form that sum in tiles, apply Adam element by element, and add the tile's dot
products and squared norm to the sample's. Weight gradients are never computed: the backward pass is asked only for the
gradient of the embeddings' output. On a GPU signals/kernels.py does the same with fewer passes.

Only weights of linear layers that train count, LoRA's included. Embeddings, norms and biases are left out, as usual for
gradient-based selection; a weight tied to the embedding counts by its use as output layer alone, in candidates as in
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
GPU_TILE = 1 << 24  # larger, since launching an operation costs more there
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamMoments:
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
        """(a, b, gain, square_gain, floor) of the update (a m + gain g) / (sqrt(b v + square_gain g^2) + floor)."""
        b1, b2 = self.betas
        t = self.step + 1
        scale = (1 - b2**t) ** 0.5  # with c = 1 - b1^t the update is (scale / c) m' / (sqrt(v') + scale eps)
        factor = scale / (1 - b1**t)
        return b1 * factor, b2, (1 - b1) * factor, 1 - b2, scale * self.eps

    def tile(self, rows: slice) -> AdamTile:
        """The update of some rows of the weight, prepared once for all samples."""
        first_decay, second_decay, gain, square_gain, floor = self.constants()
        first, second = upcast(self.first[rows]) * first_decay, upcast(self.second[rows]) * second_decay
        return AdamTile(first, second, gain, square_gain, floor)

    def update(self, gradient: Tensor) -> Tensor:
        """[..., d_out, d_in] gradients -> updates of the same shape."""
        return self.tile(slice(None)).update(gradient)


@dataclass(frozen=True)
class AdamTile:
    """The update (first + gain g) / (sqrt(second + square_gain g^2) + floor) of rows of a weight."""

    first: Tensor
    second: Tensor
    gain: float
    square_gain: float
    floor: float

    def update(self, gradient: Tensor) -> Tensor:
        """Gradients that broadcast with the moments -> updates."""
        root = torch.addcmul(self.second, gradient, gradient, value=self.square_gain).sqrt_().add_(self.floor)
        return torch.add(self.first, gradient, alpha=self.gain).div_(root)


@dataclass
class LayerOperands:
    """What a linear layer's gradients are contracted with; callables, so that only one layer's tensors are in memory."""

    directions: Callable[[], Tensor] | None  # -> [S, d_out, d_in] float32; None: norms only
    adam: Callable[[], AdamMoments] | None = None  # None: plain gradients


@dataclass
class DotAndNormSums:
    """Per sample of a batch, summed over the layers so far."""

    dot: Tensor  # [n, S] inner products with the directions
    norm2: Tensor  # [n] squared norms

    @staticmethod
    def zeros(
        num_samples: int, num_directions: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> DotAndNormSums:
        """The sums before the first layer."""
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        return DotAndNormSums(torch.zeros(num_samples, num_directions, **options), torch.zeros(num_samples, **options))


@dataclass(frozen=True)
class SampleSpan:
    """Positions start..stop-1 of a row belong to a sample."""

    sample: int
    row: int
    start: int
    stop: int


def sample_spans(segment_ids: Tensor) -> list[SampleSpan]:
    """[b, S] index of the sample at each position, -1 on padding -> one span for each run of a sample."""
    spans = []
    for row, values in enumerate(segment_ids.cpu()):
        samples, lengths = torch.unique_consecutive(values, return_counts=True)
        stops = lengths.cumsum(0).tolist()
        for sample, stop, length in zip(samples.tolist(), stops, lengths.tolist(), strict=True):
            if sample >= 0:
                spans.append(SampleSpan(sample, row, stop - length, stop))
    return spans


def upcast(tensor: Tensor) -> Tensor:
    """A tensor in the precision of sums: float32, or float64 where the model computes in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def accumulate_layer(
    sums: DotAndNormSums, layer: LayerOperands, inputs: Tensor, grads: Tensor, spans: Sequence[SampleSpan] | None = None
) -> None:
    """Add one layer's contribution: [b, T, d_in] inputs, [b, T, d_out] gradients of its outputs.

    `spans`: at most one per sample; None: every row is a sample of its own.
    """
    on_gpu = inputs.device.type == "cuda"
    if not (on_gpu and inputs.dtype == grads.dtype and inputs.dtype in HALF_DTYPES):
        inputs, grads = upcast(inputs), upcast(grads)
    if spans is None:
        spans = row_spans(inputs)
    directions = upcast(layer.directions()) if layer.directions is not None else None
    adam = layer.adam() if layer.adam is not None else None
    d_in, d_out = inputs.shape[-1], grads.shape[-1]
    num_rows = max(1, min(d_out, (GPU_TILE if on_gpu else TILE) // d_in))
    for first in range(0, d_out, num_rows):
        rows = slice(first, min(first + num_rows, d_out))
        tile_directions = None if directions is None else directions[:, rows].flatten(1).t()  # [num_rows * d_in, S]
        adam_tile = None if adam is None else adam.tile(rows)
        for span in spans:
            positions = slice(span.start, span.stop)
            tile = matmul_fp32(grads[span.row, positions, rows].t(), inputs[span.row, positions])  # [num_rows, d_in]
            if adam_tile is not None:
                tile = adam_tile.update(tile)
            flat = tile.flatten()
            sums.norm2[span.sample] += flat.dot(flat)
            if tile_directions is not None:
                sums.dot[span.sample] += flat @ tile_directions


def row_spans(inputs: Tensor) -> list[SampleSpan]:
    """The spans of [b, T, ...] inputs when every row is a sample."""
    return [SampleSpan(row, row, 0, inputs.shape[1]) for row in range(len(inputs))]


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product, of half-precision factors too, with float32 or float64 sums that are not rounded afterwards."""
    if left.dtype in HALF_DTYPES:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right)


class TorchAccumulator:
    """Accumulates the sums of one batch with torch's own operations."""

    def __init__(self, sums: DotAndNormSums, spans: Sequence[SampleSpan] | None) -> None:
        self.sums, self.spans = sums, spans

    def add(self, layer: LayerOperands, inputs: Tensor, grads: Tensor) -> None:
        accumulate_layer(self.sums, layer, inputs, grads, self.spans)

    def finish(self) -> None:
        """Does nothing: `sums` are up to date after every layer."""


@dataclass
class GradientHooks:
    """Hooks on the linear layers of a model. Inside `recording` a backward pass adds to the sums, complete at its end."""

    modules: dict[str, nn.Linear]
    layers: dict[str, LayerOperands]
    accumulator_class: Any = TorchAccumulator  # or kernels.TritonAccumulator; see signals/kernel_choice.py
    accumulator: Any = field(default=None, init=False)
    _last_cast: tuple[Tensor, Tensor] | None = field(default=None, init=False)  # see `_cast_inputs`

    @contextmanager
    def recording(
        self,
        num_samples: int,
        num_directions: int,
        device: torch.device,
        spans: Sequence[SampleSpan] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[DotAndNormSums]:
        """Accumulate over one forward and backward pass of a batch; `spans`: see `accumulate_layer`."""
        sums = DotAndNormSums.zeros(num_samples, num_directions, device, dtype)
        self.accumulator = (TorchAccumulator if dtype == torch.float64 else self.accumulator_class)(sums, spans)
        handles = [module.register_forward_hook(self._forward_hook(name)) for name, module in self.modules.items()]
        try:
            yield sums
            self.accumulator.finish()
        finally:
            for handle in handles:
                handle.remove()
            self.accumulator = self._last_cast = None

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # the first of two forward passes under activation checkpointing
                return
            inputs = self._cast_inputs(args[0], output.dtype)
            output.register_hook(lambda grad: self._add(name, inputs, grad))

        return after_forward

    def _cast_inputs(self, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs as the layer multiplied them: under autocast, in half precision. Layers that follow each other with the
        same inputs, like those of queries, keys and values, share one copy until the backward pass."""
        if inputs.dtype == dtype:
            return inputs.detach()
        if self._last_cast is None or self._last_cast[0] is not inputs:
            self._last_cast = (inputs, inputs.detach().to(dtype))
        return self._last_cast[1]

    def _add(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        if inputs.dim() != 3:
            raise TrainingFault(
                f"gradient scores: the input of {name} has shape {tuple(inputs.shape)}, which does not tell samples apart"
            )
        with torch.no_grad():
            self.accumulator.add(self.layers[name], inputs, grad.detach())


def trained_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers whose weight trains, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.requires_grad}
