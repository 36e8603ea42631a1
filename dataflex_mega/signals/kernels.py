"""Streaming gradient scores on a GPU: the gradients of one weight for some samples at a time, finished by a Triton kernel.

The GPU's matrix library forms the gradients into a buffer of at most half a gibibyte. One kernel then does all that is left
in a single pass over it: Adam's update element by element, squared norms, inner products with the directions. Moments and
directions are read once for all samples of a piece. Partial sums are added in a fixed order, so that a repeated run gives
the same bits.

Two other plans were slower on an H100: a kernel that forms the gradient in registers, which has to read inputs, moments and
directions again for every tile and sample; and pieces small enough for the chip's cache, whose launches cost more than the
memory traffic they save (docs/gradient-signals.md has the figures).

Import this module only where signals/capability.py says so: it needs Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from dataflex_mega.signals.gradients import Layer, Span, Sums, product, rows_of

PIECE = 512 << 20  # bytes of gradients that are formed at once
SAMPLES = 16  # how many samples a piece has at most
SLOTS = 1 << 16  # partial sums of a sample that are kept before they are added up


@triton.jit
def _finish(
    gradients, first, second, directions, out,
    size, samples, stride, slots, keep1, keep2, gain, share, floor,
    ADAM: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns of [samples, size] gradients -> their part of squared norms and products, into out [samples, 1 + S, slots]."""
    rows, program = tl.arange(0, ROWS), tl.program_id(0)
    here = rows[:, None] < samples
    norm = tl.zeros((ROWS, COLUMNS), tl.float32)
    along = tl.zeros((ROWS, COLUMNS if S == 1 else WIDTH), tl.float32)
    for step in range(STEPS):
        column = (program * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        g = tl.load(gradients + rows[:, None].to(tl.int64) * size + column[None, :], here & inside[None, :], 0.0)
        g = g.to(tl.float32)
        if ADAM:
            m = tl.load(first + column, inside, 0.0).to(tl.float32) * keep1
            v = tl.load(second + column, inside, 1.0).to(tl.float32) * keep2
            below = tl.sqrt(v[None, :] + share * g * g) + floor
            g = (m[None, :] + gain * g) * tl.rsqrt(below * below)  # two fast instructions; a division takes eight
            g = tl.where(here, g, 0.0)
        norm += g * g
        if S == 1:
            along += g * tl.load(directions + column, inside, 0.0).to(tl.float32)[None, :]
        elif S > 1:
            s = tl.arange(0, WIDTH)
            u = tl.load(directions + s[None, :].to(tl.int64) * stride + column[:, None],
                        (s[None, :] < S) & inside[:, None], 0.0)  # fmt: skip
            along = tl.dot(g, u.to(tl.float32), along, input_precision="tf32x3")
    place = out + rows * (1 + S) * slots + program
    tl.store(place, tl.sum(norm, 1), rows < samples)
    if S == 1:
        tl.store(place + slots, tl.sum(along, 1), rows < samples)
    elif S > 1:
        s = tl.arange(0, WIDTH)
        tl.store(place[:, None] + (1 + s[None, :]) * slots, along, here & (s[None, :] < S))


class Fused:
    """The sums of one batch. Same use as signals.gradients.Plain, same numbers up to rounding and the order of addition.

    Where inputs are bfloat16 the gradients are rounded to it too, as they are in training; all else is float32.
    """

    def __init__(self, sums: Sums, where: Sequence[Span] | None) -> None:
        self.sums, self.where = sums, where
        self.out: Tensor | None = None  # [n, 1 + S, SLOTS] partial sums of the samples in `where`
        self.used = 0

    def add(self, layer: Layer, inputs: Tensor, grads: Tensor) -> None:
        """Add one layer's part: [b, T, d_in] inputs, [b, T, d_out] gradients of its outputs.

        Positions outside every sample have no gradient: they are padding.
        """
        if self.where is None:
            self.where = rows_of(inputs)
        where, count = self.where, self.sums.dot.shape[1]
        adam = layer.adam() if layer.adam is not None else None
        directions = layer.directions().contiguous() if layer.directions is not None and count else None
        moments = None if adam is None else (adam.first.contiguous(), adam.second.contiguous())
        constants = (0.0,) * 5 if adam is None else adam.constants()
        for start, stop, rows in pieces(len(where), grads.shape[-1], inputs.shape[-1], size_of(inputs)):
            made = gradients_of(inputs, grads, where[start:stop], rows)
            self._finish(made, start, rows.start * inputs.shape[-1], moments, directions, constants)

    def _finish(
        self,
        made: Tensor,
        start: int,
        first: int,
        moments: tuple[Tensor, Tensor] | None,
        directions: Tensor | None,
        constants: Sequence[float],
    ) -> None:
        """Partial sums of [n, rows, d_in] gradients of samples from number `start` on, into slots of their own.

        `first`: which element of the weight theirs is.
        """
        samples, size, count = len(made), made[0].numel(), self.sums.dot.shape[1]
        options = shape_of(samples, size, count)
        programs = -(-size // (options["COLUMNS"] * options["STEPS"]))
        out = self._slots(programs)[start]
        m, v = (made, made) if moments is None else (t.view(-1)[first:] for t in moments)
        u, stride = (made, 0) if directions is None else (directions.view(-1)[first:], directions.stride(0))
        kernel: Any = _finish  # what triton.jit makes of it takes a grid in brackets
        kernel[(programs,)](
            made, m, v, u, out, size, samples, stride, SLOTS, *constants, ADAM=moments is not None, S=count,
            WIDTH=max(16, triton.next_power_of_2(count)), **options,
        )  # fmt: skip

    def _slots(self, programs: int) -> Tensor:
        """[n, 1 + S, SLOTS], from the first slot that is free; there are `programs` of them."""
        if self.used + programs > SLOTS:
            self.finish()
        if self.out is None:
            assert self.where is not None
            self.out = self.sums.norm2.new_zeros(len(self.where), 1 + self.sums.dot.shape[1], SLOTS)
        free, self.used = self.used, self.used + programs
        return self.out[..., free:]

    def finish(self) -> None:
        """Bring `sums` up to date."""
        if self.out is None or self.where is None:
            return
        samples = torch.tensor([span.sample for span in self.where], device=self.out.device)
        found = self.out.sum(2)
        self.sums.norm2[samples] += found[:, 0]
        self.sums.dot[samples] += found[:, 1:]
        self.out, self.used = None, 0


def size_of(inputs: Tensor) -> int:
    """Bytes of an element of gradients."""
    return 2 if inputs.dtype == torch.bfloat16 else 4


def pieces(samples: int, d_out: int, d_in: int, size: int) -> Iterator[tuple[int, int, slice]]:
    """(first sample, last + 1, rows of the weight) of pieces of at most PIECE bytes where that is 128 rows or more."""
    together = min(samples, SAMPLES)
    rows = max(128, min(PIECE // (together * d_in * size), SLOTS * 512 // d_in) // 128 * 128)
    for first in range(0, d_out, rows):
        for start in range(0, samples, together):
            yield start, min(start + together, samples), slice(first, min(first + rows, d_out))


def gradients_of(inputs: Tensor, grads: Tensor, where: Sequence[Span], rows: slice) -> Tensor:
    """-> [len(where), rows, d_in] gradients of some rows of the weight."""
    half = inputs.dtype == torch.float16  # whose range is too small for a gradient
    lines = [span.row for span in where]
    if lines == list(range(lines[0], lines[0] + len(lines))):
        left, right = grads[lines[0] : lines[-1] + 1, :, rows].transpose(1, 2), inputs[lines[0] : lines[-1] + 1]
        return torch.bmm(left, right, out_dtype=torch.float32) if half else torch.bmm(left, right)
    made = inputs.new_empty(len(where), rows.stop - rows.start, inputs.shape[-1], dtype=torch.float32 if half else None)
    for target, span in zip(made, where, strict=True):
        cut = slice(span.start, span.stop)
        if half:
            target.copy_(product(grads[span.row, cut, rows].t(), inputs[span.row, cut]))
        else:
            torch.mm(grads[span.row, cut, rows].t(), inputs[span.row, cut], out=target)
    return made


def shape_of(samples: int, size: int, count: int) -> dict[str, Any]:
    """What a program does: rows and columns of a block, and how many blocks. A function of shapes alone."""
    rows = triton.next_power_of_2(samples) if count < 2 else max(16, triton.next_power_of_2(samples))
    columns = 128 if count < 2 else 64
    steps = 16 if size > SLOTS * columns else 8 if size > columns * 1024 else 1
    return {"ROWS": rows, "COLUMNS": columns, "STEPS": steps, "num_warps": 4}
