"""Streaming gradient scores on a GPU: the gradients of one weight for some samples at a time, finished by a Triton kernel.

The GPU's matrix library forms the gradients into a buffer of at most half a gibibyte. One kernel then does all that is left
in a single pass over it: Adam's update element by element, squared norms, inner products with the directions. Moments and
directions are read once for all samples of a piece. Partial sums are added in a fixed order, so that a repeated run gives
the same bits.

Two alternatives were slower on an H100: a kernel that forms the gradient in registers, which has to read inputs, moments and
directions again for every tile and sample; and pieces small enough for the chip's cache, whose launches cost more than the
memory traffic they save (docs/gradient-signals.md has the figures).

Import this module only where signals/kernel_choice.py says so: it needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from dataflex_mega.signals.per_sample_gradients import DotAndNormSums, LayerOperands, SampleSpan, matmul_fp32, row_spans

TILE_BYTES = 512 << 20  # bytes of gradients that are formed at once
SAMPLES = 16  # at most, in a tile
SLOTS = 1 << 16  # partial sums per sample in memory before they are added up


@triton.jit
def _finish_kernel(
    gradients, first, second, directions, out,
    size, samples, stride, slots, first_decay, second_decay, gain, square_gain, floor,
    ADAM: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns of [samples, size] gradients -> partial squared norms and dot products, into out [samples, 1 + S, slots]."""
    rows, program = tl.arange(0, ROWS), tl.program_id(0)
    in_batch = rows[:, None] < samples
    norm = tl.zeros((ROWS, COLUMNS), tl.float32)
    dots = tl.zeros((ROWS, COLUMNS if S == 1 else WIDTH), tl.float32)
    for step in range(STEPS):
        column = (program * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        in_weight = column < size
        g = tl.load(gradients + rows[:, None].to(tl.int64) * size + column[None, :], in_batch & in_weight[None, :], 0.0)
        g = g.to(tl.float32)
        if ADAM:
            m = tl.load(first + column, in_weight, 0.0).to(tl.float32) * first_decay
            v = tl.load(second + column, in_weight, 1.0).to(tl.float32) * second_decay
            denominator = tl.sqrt(v[None, :] + square_gain * g * g) + floor
            # rsqrt of the square: two fast instructions, where a division takes eight.
            g = (m[None, :] + gain * g) * tl.rsqrt(denominator * denominator)
            g = tl.where(in_batch, g, 0.0)
        norm += g * g
        if S == 1:
            dots += g * tl.load(directions + column, in_weight, 0.0).to(tl.float32)[None, :]
        elif S > 1:
            s = tl.arange(0, WIDTH)
            u = tl.load(directions + s[None, :].to(tl.int64) * stride + column[:, None],
                        (s[None, :] < S) & in_weight[:, None], 0.0)  # fmt: skip
            dots = tl.dot(g, u.to(tl.float32), dots, input_precision="tf32x3")
    slot = out + rows * (1 + S) * slots + program
    tl.store(slot, tl.sum(norm, 1), rows < samples)
    if S == 1:
        tl.store(slot + slots, tl.sum(dots, 1), rows < samples)
    elif S > 1:
        s = tl.arange(0, WIDTH)
        tl.store(slot[:, None] + (1 + s[None, :]) * slots, dots, in_batch & (s[None, :] < S))


class TritonAccumulator:
    """Accumulates the sums of one batch as per_sample_gradients.TorchAccumulator does, up to rounding and the order of sums.

    Where inputs are bfloat16 the gradients are rounded to it too, as they are in training; all else is float32.
    """

    def __init__(self, sums: DotAndNormSums, spans: Sequence[SampleSpan] | None) -> None:
        self.sums, self.spans = sums, spans
        self._partial_sums: Tensor | None = None  # [n, 1 + S, SLOTS] of the samples in `spans`
        self._used_slots = 0

    def add(self, layer: LayerOperands, inputs: Tensor, grads: Tensor) -> None:
        """Add one layer's contribution: [b, T, d_in] inputs, [b, T, d_out] gradients of its outputs.

        Positions outside every sample have no gradient: they are padding.
        """
        if self.spans is None:
            self.spans = row_spans(inputs)
        spans, num_directions = self.spans, self.sums.dot.shape[1]
        adam = layer.adam() if layer.adam is not None else None
        directions = layer.directions().contiguous() if layer.directions is not None and num_directions else None
        moments = None if adam is None else (adam.first.contiguous(), adam.second.contiguous())
        constants = (0.0,) * 5 if adam is None else adam.constants()
        for start, stop, rows in weight_tiles(len(spans), grads.shape[-1], inputs.shape[-1], gradient_bytes(inputs)):
            gradients = form_gradients(inputs, grads, spans[start:stop], rows)
            self._reduce(gradients, start, rows.start * inputs.shape[-1], moments, directions, constants)

    def _reduce(
        self,
        gradients: Tensor,
        start: int,
        first: int,
        moments: tuple[Tensor, Tensor] | None,
        directions: Tensor | None,
        constants: Sequence[float],
    ) -> None:
        """Write partial sums of [n, rows, d_in] gradients, the first of sample `start`, into unused slots.

        `first`: the index of their first element in the flattened weight.
        """
        num_samples, size, num_directions = len(gradients), gradients[0].numel(), self.sums.dot.shape[1]
        options = block_options(num_samples, size, num_directions)
        programs = -(-size // (options["COLUMNS"] * options["STEPS"]))
        out = self._slots(programs)[start]
        m, v = (gradients, gradients) if moments is None else (t.view(-1)[first:] for t in moments)
        u, stride = (gradients, 0) if directions is None else (directions.view(-1)[first:], directions.stride(0))
        kernel: Any = _finish_kernel  # triton.jit's result takes a grid in brackets
        kernel[(programs,)](
            gradients, m, v, u, out, size, num_samples, stride, SLOTS, *constants, ADAM=moments is not None,
            S=num_directions, WIDTH=max(16, triton.next_power_of_2(num_directions)), **options,
        )  # fmt: skip

    def _slots(self, programs: int) -> Tensor:
        """[n, 1 + S, at least `programs`] the partial sums from the first unused slot on."""
        if self._used_slots + programs > SLOTS:
            self.finish()
        if self._partial_sums is None:
            assert self.spans is not None
            self._partial_sums = self.sums.norm2.new_zeros(len(self.spans), 1 + self.sums.dot.shape[1], SLOTS)
        first, self._used_slots = self._used_slots, self._used_slots + programs
        return self._partial_sums[..., first:]

    def finish(self) -> None:
        """Add the partial sums to `sums`."""
        if self._partial_sums is None or self.spans is None:
            return
        samples = torch.tensor([span.sample for span in self.spans], device=self._partial_sums.device)
        totals = self._partial_sums.sum(2)
        self.sums.norm2[samples] += totals[:, 0]
        self.sums.dot[samples] += totals[:, 1:]
        self._partial_sums, self._used_slots = None, 0


def gradient_bytes(inputs: Tensor) -> int:
    """Bytes per element of gradients that are formed from these inputs."""
    return 2 if inputs.dtype == torch.bfloat16 else 4


def weight_tiles(num_samples: int, d_out: int, d_in: int, element_bytes: int) -> Iterator[tuple[int, int, slice]]:
    """(first sample, last + 1, rows of the weight) of tiles of at most TILE_BYTES bytes, but of 128 rows at least."""
    samples_per_tile = min(num_samples, SAMPLES)
    rows = max(128, min(TILE_BYTES // (samples_per_tile * d_in * element_bytes), SLOTS * 512 // d_in) // 128 * 128)
    for first in range(0, d_out, rows):
        for start in range(0, num_samples, samples_per_tile):
            yield start, min(start + samples_per_tile, num_samples), slice(first, min(first + rows, d_out))


def form_gradients(inputs: Tensor, grads: Tensor, spans: Sequence[SampleSpan], rows: slice) -> Tensor:
    """[len(spans), rows, d_in]: the samples' gradients of some rows of the weight."""
    half = inputs.dtype == torch.float16  # whose range is too small for a gradient
    lines = [span.row for span in spans]
    if lines == list(range(lines[0], lines[0] + len(lines))):
        left, right = grads[lines[0] : lines[-1] + 1, :, rows].transpose(1, 2), inputs[lines[0] : lines[-1] + 1]
        return torch.bmm(left, right, out_dtype=torch.float32) if half else torch.bmm(left, right)
    dtype = torch.float32 if half else None
    gradients = inputs.new_empty(len(spans), rows.stop - rows.start, inputs.shape[-1], dtype=dtype)
    for gradient, span in zip(gradients, spans, strict=True):
        positions = slice(span.start, span.stop)
        if half:
            gradient.copy_(matmul_fp32(grads[span.row, positions, rows].t(), inputs[span.row, positions]))
        else:
            torch.mm(grads[span.row, positions, rows].t(), inputs[span.row, positions], out=gradient)
    return gradients


def block_options(num_samples: int, size: int, num_directions: int) -> dict[str, Any]:
    """Rows and columns of a block and how many blocks one program handles: a function of shapes alone."""
    power = triton.next_power_of_2(num_samples)
    rows = power if num_directions < 2 else max(16, power)
    columns = 128 if num_directions < 2 else 64
    steps = 16 if size > SLOTS * columns else 8 if size > columns * 1024 else 1
    return {"ROWS": rows, "COLUMNS": columns, "STEPS": steps, "num_warps": 4}
