"""The Triton kernel against an independent formula in float64 and against torch's operations.

Needs a GPU; with TRITON_INTERPRET=1 and triton installed, Triton's interpreter runs the float32 cases on a CPU.
"""

import os

import pytest
import torch

from dataflex_mega.signals.per_sample_gradients import (
    AdamMoments,
    DotAndNormSums,
    GradientHooks,
    LayerOperands,
    SampleSpan,
    TorchAccumulator,
)

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not INTERPRETED, reason="needs a CUDA device"),
]
# A length that is no multiple of a block, whole rows, samples side by side in a row, one of one position.
SPANS = {
    "rows": None,
    "padded": [SampleSpan(0, 0, 0, 70), SampleSpan(1, 1, 0, 1), SampleSpan(2, 2, 0, 130)],
    "packed": [SampleSpan(2, 0, 0, 50), SampleSpan(0, 0, 50, 130), SampleSpan(1, 2, 3, 99)],
}
SHAPES = {"even": (256, 128), "odd": (72, 200), "lora_a": (8, 136), "lora_b": (136, 8), "tall": (1000, 40)}


def case(shape, dtype, seed=0, samples=3, length=130, directions=2):
    make = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    inputs = torch.randn(samples, length, d_in, generator=make)
    grads = torch.randn(samples, length, d_out, generator=make) * 1e-2
    first = torch.randn(d_out, d_in, generator=make) * 1e-2
    second = torch.rand(d_out, d_in, generator=make) * 1e-3
    towards = torch.randn(directions, d_out, d_in, generator=make)
    return [t.to(DEVICE, dtype) for t in (inputs, grads)] + [t.to(DEVICE) for t in (first, second, towards)]


def padded(grads, spans):
    """Gradients that are zero outside the samples, as they are on padding."""
    masked = torch.zeros_like(grads)
    for span in spans or [SampleSpan(row, row, 0, grads.shape[1]) for row in range(len(grads))]:
        masked[span.row, span.start : span.stop] = grads[span.row, span.start : span.stop]
    return masked


def exactly(inputs, grads, adam, towards, spans):
    """(dot, norm2) in float64, from the definition."""
    inputs, grads = inputs.double(), grads.double()
    spans = spans or [SampleSpan(row, row, 0, inputs.shape[1]) for row in range(len(inputs))]
    dot, norm2 = torch.zeros(3, len(towards)).double(), torch.zeros(3).double()
    for span in spans:
        positions = slice(span.start, span.stop)
        g = torch.einsum("to,ti->oi", grads[span.row, positions], inputs[span.row, positions])
        if adam is not None:
            b1, b2 = adam.betas
            m = b1 * adam.first.double() + (1 - b1) * g
            v = b2 * adam.second.double() + (1 - b2) * g**2
            g = (m / (1 - b1 ** (adam.step + 1))) / ((v / (1 - b2 ** (adam.step + 1))).sqrt() + adam.eps)
        norm2[span.sample] = (g**2).sum()
        dot[span.sample] = torch.stack([(g * u.double()).sum() for u in towards])
    return dot, norm2


def run(kind, inputs, grads, adam, towards, spans):
    sums = DotAndNormSums.zeros(3, len(towards), DEVICE)
    accumulator = kind(sums, spans)
    accumulator.add(LayerOperands(lambda: towards, None if adam is None else lambda: adam), inputs, grads)
    accumulator.finish()
    return sums


def check(sums, dot, norm2, towards, rtol):
    torch.testing.assert_close(sums.norm2.double().cpu(), norm2, rtol=rtol, atol=0)
    scale = norm2.sqrt().unsqueeze(1) * towards.double().flatten(1).norm(dim=1).cpu()  # of an inner product
    assert ((sums.dot.double().cpu() - dot).abs() <= rtol * scale).all()


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_float32_is_exact(shape, adam, spans):
    from dataflex_mega.signals.kernels import TritonAccumulator

    inputs, grads, first, second, towards = case(SHAPES[shape], torch.float32)
    moments, grads = AdamMoments(first, second, 7, (0.9, 0.99), 1e-6) if adam else None, padded(grads, SPANS[spans])
    dot, norm2 = exactly(inputs, grads, moments, towards, SPANS[spans])
    assert norm2.min() > 0
    check(run(TritonAccumulator, inputs, grads, moments, towards, SPANS[spans]), dot, norm2, towards, 1e-5)
    check(run(TorchAccumulator, inputs, grads, moments, towards, SPANS[spans]), dot, norm2, towards, 1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the CPU has no product of half-precision factors with float32 sums")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_more_than_training(dtype, shape, spans, stored):
    """Torch's operations keep float32 sums; the kernel rounds a bfloat16 gradient once, by at most 2^-9 of it, and as
    rounding errors do not add up over the elements, sums differ by far less."""
    from dataflex_mega.signals.kernels import TritonAccumulator

    inputs, grads, first, second, towards = case(SHAPES[shape], dtype)
    first, second, towards = first.to(stored), second.to(stored), towards.to(stored)
    moments, grads = AdamMoments(first, second, 7, (0.9, 0.99), 1e-6), padded(grads, SPANS[spans])
    for adam in (None, moments):
        dot, norm2 = exactly(inputs, grads, adam, towards, SPANS[spans])
        check(run(TorchAccumulator, inputs, grads, adam, towards, SPANS[spans]), dot, norm2, towards, 2e-5)
        elements = first.numel()
        tolerance = 8 * 2**-8 / elements**0.5 if dtype == torch.bfloat16 else 2e-5
        check(run(TritonAccumulator, inputs, grads, adam, towards, SPANS[spans]), dot, norm2, towards, tolerance)


@pytest.mark.parametrize("directions", [0, 1, 2, 17])
def test_any_number_of_directions(directions):
    from dataflex_mega.signals.kernels import TritonAccumulator

    inputs, grads, first, second, towards = case((72, 200), torch.float32, directions=directions)
    adam = AdamMoments(first, second, 7, (0.9, 0.99), 1e-6)
    dot, norm2 = exactly(inputs, grads, adam, towards, None) if directions else (torch.zeros(3, 0).double(), None)
    sums = run(TritonAccumulator, inputs, grads, adam, towards, None)
    if directions:
        check(sums, dot, norm2, towards, 1e-5)
    torch.testing.assert_close(
        sums.norm2, run(TorchAccumulator, inputs, grads, adam, towards, None).norm2, rtol=1e-5, atol=0
    )


def test_more_samples_than_a_piece_has_and_gradients_that_are_views(monkeypatch):
    from dataflex_mega.signals import kernels
    from dataflex_mega.signals.kernels import SAMPLES, TritonAccumulator

    monkeypatch.setattr(kernels, "TILE_BYTES", 1)  # so that rows are cut too
    count = 2 * SAMPLES + 3
    make = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 20, 64, generator=make).to(DEVICE)
    grads = torch.randn(20, count, 300, generator=make).to(DEVICE).transpose(0, 1)
    towards = torch.randn(1, 300, 64, generator=make).to(DEVICE)
    sums = DotAndNormSums.zeros(count, 1, DEVICE)
    accumulator = TritonAccumulator(sums, None)
    accumulator.add(LayerOperands(lambda: towards), inputs, grads)
    accumulator.add(LayerOperands(lambda: towards), inputs, grads)
    accumulator.finish()
    gradient = torch.einsum("nto,nti->noi", grads.double(), inputs.double())
    torch.testing.assert_close(sums.norm2.double(), 2 * (gradient**2).sum((1, 2)), rtol=1e-5, atol=0)
    expected = 2 * torch.einsum("noi,soi->ns", gradient, towards.double())
    torch.testing.assert_close(
        sums.dot.double(), expected, rtol=0, atol=2e-5 * float(gradient.norm(dim=(1, 2)).max()) * 150
    )


def test_a_repeated_run_gives_the_same_bits():
    from dataflex_mega.signals.kernels import TritonAccumulator

    inputs, grads, first, second, towards = case((256, 384), torch.float32)
    adam = AdamMoments(first, second, 7, (0.9, 0.99), 1e-6)
    repeats = [run(TritonAccumulator, inputs, grads, adam, towards, None) for _ in range(3)]
    for sums in repeats[1:]:
        assert torch.equal(sums.dot, repeats[0].dot) and torch.equal(sums.norm2, repeats[0].norm2)


def test_hooks_use_the_kernel_and_leave_float64_to_torch():
    from dataflex_mega.signals.kernels import TritonAccumulator

    hooks = GradientHooks({}, {}, TritonAccumulator)
    with hooks.recording(2, 1, DEVICE):
        assert isinstance(hooks.accumulator, TritonAccumulator)
    with hooks.recording(2, 1, DEVICE, dtype=torch.float64):
        assert isinstance(hooks.accumulator, TorchAccumulator)
