"""Projected features against the projections of autograd's gradients, written out in float64."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.per_sample_gradients import AdamMoments
from dataflex_mega.signals.projection import DenseProjection, RankOneAdam, TwoSidedProjection, random_signs
from dataflex_mega.types import ProjectionSpec
from tests.distributed.layouts import samples_of, tiny_llama
from tests.unit.signals.test_per_sample_gradients import engine_of, gradient_of, lora_of


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def adam_of(shape, step=4, seed=0):
    make = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=make).double() * 0.1
    return AdamMoments(first, torch.rand(shape, generator=make).double() * 0.01 + 1e-4, step, (0.9, 0.99), 1e-8)


def test_signs_are_a_function_of_seed_and_name():
    first = random_signs(0, "layer", 40, 50)
    assert set(first.unique().tolist()) == {-1.0, 1.0} and abs(first.mean().item()) < 0.1
    assert torch.equal(first, random_signs(0, "layer", 40, 50))
    assert not torch.equal(first, random_signs(1, "layer", 40, 50)) and not torch.equal(
        first, random_signs(0, "other", 40, 50)
    )
    key = int.from_bytes(hashlib.sha256(b"0/layer").digest()[:16], "little")
    words = [int(word) for word in np.random.Generator(np.random.Philox(key=key)).integers(0, 2**64, 32, np.uint64)]
    bits = [(words[index // 64] >> (index % 64)) & 1 for index in range(2000)]
    assert first.flatten().tolist() == [2.0 * bit - 1 for bit in bits], "Philox, bit after bit"


def test_two_sided_is_the_kronecker_product_applied_to_the_gradient():
    """In float64: (P_o kron P_i) vec(G) = vec(P_o G P_i^T) = what comes from activations alone."""
    torch.manual_seed(0)
    inputs, grads = torch.randn(3, 9, 20).double(), torch.randn(3, 9, 13).double()
    layer = TwoSidedProjection("layer", (13, 20), 5, 7)
    assert layer.outputs is not None and layer.inputs is not None and layer.width == 25
    features = layer.features(inputs, grads, plain=True)
    for i in range(3):
        gradient = grads[i].t() @ inputs[i]
        kron = torch.kron(layer.outputs.double(), layer.inputs.double()) @ gradient.flatten()
        assert (kron - (layer.outputs.double() @ gradient @ layer.inputs.double().t()).flatten()).abs().max() < 1e-13
        assert (features[i] - kron).abs().max() < 1e-12


def test_short_sides_are_kept_whole_and_then_nothing_is_lost():
    torch.manual_seed(0)
    inputs, grads = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 6).double()
    features = TwoSidedProjection("layer", (6, 4), 6, 0).features(inputs, grads, plain=True)
    assert torch.allclose(features, grads.transpose(1, 2).bmm(inputs).flatten(1))
    assert TwoSidedProjection("layer", (6, 400), 6, 0).shape == (6, 6)


def test_preconditioned_features_are_those_of_the_rank_one_update_with_its_momentum():
    torch.manual_seed(1)
    inputs, grads, adam = torch.randn(2, 9, 20).double(), torch.randn(2, 9, 13).double(), adam_of((13, 20))
    layer = TwoSidedProjection("layer", (13, 20), 5, 7)
    layer.precondition(RankOneAdam.from_moments(adam))
    assert layer.outputs is not None and layer.inputs is not None
    features = layer.features(inputs, grads, plain=False)
    # The formula once more, in NumPy.
    b1, b2, t = 0.9, 0.99, 5
    second = b2 * adam.second.numpy() / (1 - b2**t) + adam.eps**2
    rank_one = np.outer(second.sum(1), second.sum(0)) / second.sum()
    for i in range(2):
        gradient = (grads[i].t() @ inputs[i]).numpy()
        update = (b1 * adam.first.numpy() + (1 - b1) * gradient) / (1 - b1**t) / np.sqrt(rank_one)
        expected = layer.outputs.double().numpy() @ update @ layer.inputs.double().numpy().T
        np.testing.assert_allclose(features[i].numpy(), expected.ravel(), rtol=1e-10, atol=1e-10)
        update = RankOneAdam.from_moments(adam).update(torch.from_numpy(gradient)).numpy()
        np.testing.assert_allclose(update, update, rtol=1e-12)


def test_where_the_second_moment_has_rank_one_the_update_is_adams():
    """Up to g^2's own 1 - b2 of the second moment, which is left out."""
    torch.manual_seed(2)
    second = torch.outer(torch.rand(13).double() + 0.1, torch.rand(20).double() + 0.1)
    adam = AdamMoments(torch.randn(13, 20).double() * 0.1, second, 100, (0.9, 0.999999), 1e-12)
    gradient = torch.randn(13, 20).double() * 0.1
    torch.testing.assert_close(
        RankOneAdam.from_moments(adam).update(gradient), adam.update(gradient), rtol=1e-5, atol=1e-8
    )


def test_dense_is_one_matrix_times_the_whole_update_in_any_tiling(monkeypatch):
    from dataflex_mega.signals import projection

    torch.manual_seed(3)
    inputs, grads, adam = torch.randn(3, 9, 20).double(), torch.randn(3, 9, 13).double(), adam_of((13, 20))
    monkeypatch.setattr(projection, "TILE", 100)
    layer = DenseProjection("layer", (13, 20), 8, 2)
    layer.adam = adam
    matrix = torch.cat(
        [random_signs(2, f"layer/{row}", 8, 20 * min(5, 13 - row)) for row in range(0, 13, 5)], 1
    ).double()
    for plain in (True, False):
        gradients = grads.transpose(1, 2).bmm(inputs)
        update = gradients if plain else torch.stack([adam.update(g) for g in gradients])
        expected = update.flatten(1) @ matrix.t() / math.sqrt(8)
        torch.testing.assert_close(layer.features(inputs, grads, plain), expected, rtol=1e-10, atol=1e-10)


def test_inner_products_are_kept_as_johnson_and_lindenstrauss_say():
    """DenseProjection: errors of cosines below 5 / sqrt(k), spread about 1 / sqrt(k); two-sided: unbiased, wider."""
    torch.manual_seed(4)
    pairs, size = 400, 1024
    inputs, grads = torch.randn(pairs, 1, 32).double(), torch.randn(pairs, 1, 32).double()
    truth = grads.transpose(1, 2).bmm(inputs).flatten(1)
    for layer, bound in (
        (DenseProjection("a", (32, 32), size, 0), 5.0),
        (TwoSidedProjection("a", (32, 32), 16, 0), 40.0),
    ):
        features = layer.features(inputs, grads, plain=True)
        scale = truth.norm(dim=1)[::2] * truth.norm(dim=1)[1::2]
        error = ((features[::2] * features[1::2]).sum(1) - (truth[::2] * truth[1::2]).sum(1)) / scale
        assert error.abs().max() < bound / math.sqrt(size)
        assert error.mean().abs() < 3 * error.std() / math.sqrt(len(error))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["two_sided", "dense"])
def test_features_are_projections_of_autograds_gradients(alone, lora, kind):
    model = (lora_of(tiny_llama()) if lora else tiny_llama()).double()
    engine = engine_of(alone, model)
    maker = engine.feature_maker(ProjectionSpec(kind, 6, 11), adam=False)
    samples = samples_of(9)
    features = maker.features(collate(samples, 0))
    model.eval()
    assert features.dtype == torch.float64 and features.shape == (8, maker.width)
    for i, sample in enumerate(samples):
        projected = []
        for name, gradient in gradient_of(model, sample).items():
            layer = maker.layers[name]
            if isinstance(layer, TwoSidedProjection):
                left = torch.eye(gradient.shape[0]).double() if layer.outputs is None else layer.outputs.double()
                right = torch.eye(gradient.shape[1]).double() if layer.inputs is None else layer.inputs.double()
                projected.append((left @ gradient @ right.t()).flatten())
            else:
                matrix = random_signs(11, f"{name}/0", 6, gradient.numel()).double()
                projected.append(matrix @ gradient.flatten() / math.sqrt(6))
        expected = torch.cat(projected) if kind == "two_sided" else torch.stack(projected).sum(0)
        torch.testing.assert_close(features[i], expected, rtol=1e-4, atol=1e-6)  # token losses are float32


def test_a_batch_of_one_equals_a_batch_of_many(alone):
    engine = engine_of(alone, tiny_llama().double())
    engine.train_step([collate(samples_of(0), 0)], None)
    maker = engine.feature_maker(ProjectionSpec("two_sided", 6, 1), adam=True)
    samples = [sample for step in range(4) for sample in samples_of(step)]
    features = maker.features(collate(samples, 0))
    for i, sample in enumerate(samples):
        torch.testing.assert_close(maker.features(collate([sample], 0))[0], features[i], rtol=1e-5, atol=1e-6)


def test_targets_are_plain_and_moments_matter_to_candidates(alone):
    engine = engine_of(alone, tiny_llama())
    batch = collate(samples_of(1), 0)
    plain = engine.feature_maker(ProjectionSpec("two_sided", 6, 1), adam=False)
    engine.train_step([collate(samples_of(0), 0)], None)
    adam = engine.feature_maker(ProjectionSpec("two_sided", 6, 1), adam=True)
    assert torch.equal(adam.features(batch, plain=True), plain.features(batch))
    assert not torch.allclose(adam.features(batch), plain.features(batch))


def test_the_fingerprint_follows_weights_and_moments(alone):
    spec, engine = ProjectionSpec("two_sided", 6, 1), engine_of(alone, tiny_llama())
    before = engine.feature_maker(spec, adam=True).fingerprint()
    assert before == engine.feature_maker(spec, adam=True).fingerprint()
    assert before != engine.feature_maker(spec, adam=False).fingerprint()
    engine.train_step([collate(samples_of(0), 0)], None)
    after = engine.feature_maker(spec, adam=True).fingerprint()
    with torch.no_grad():
        next(engine.model.parameters())[0, 0] += 1e-3
    assert len({before, after, engine.feature_maker(spec, adam=True).fingerprint()}) == 3


def test_features_change_neither_model_nor_random_state(alone):
    engine = engine_of(alone, tiny_llama())
    engine.train_step([collate(samples_of(0), 0)], None)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    random = torch.get_rng_state()
    engine.feature_maker(ProjectionSpec("two_sided", 4, 1), adam=True).features(collate(samples_of(1), 0))
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in engine.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random) and engine.model.training


def test_an_optimizer_without_moments_is_refused(alone):
    engine = engine_of(alone, tiny_llama())
    engine.optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="gradient_type: adam needs optim"):
        engine.feature_maker(ProjectionSpec(), adam=True)
