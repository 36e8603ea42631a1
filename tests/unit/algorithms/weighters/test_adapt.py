"""ADAPT's weights against golden numbers and against the mean of sigmoids of cosines, written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.algorithms.requests import EmbeddingSignal, TargetEmbeddingSignal, requests_of
from dataflex_mega.algorithms.weighters.adapt import Adapt
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import EmbeddingSpec
from tests.unit.algorithms.examples import observed


def learn(weighter: Adapt, target: torch.Tensor, step: int) -> None:
    (request,) = requests_of(weighter, TargetEmbeddingSignal)
    weighter.receive(request, target, step)


def is_stale(weighter: Adapt, step: int) -> bool:
    (request,) = requests_of(weighter, TargetEmbeddingSignal)
    return weighter.is_due(request, step)


def scored(weighter: Adapt, scores: list[float]) -> torch.Tensor:
    """Weights of samples with these mean cosines."""
    samples = replace(observed([1.0] * len(scores)), embeddings=torch.tensor(scores).unsqueeze(1))
    return weighter.weights(samples, 0, 1)


@pytest.mark.parametrize(
    ("score", "tau", "f"),
    [(0.0, 1.0, 0.5), (0.3, 1.0, 0.5744425168), (0.3, 0.1, 0.9525741268), (1.0, 1.0, 0.7310585786)],
)
def test_golden_factors(score: float, tau: float, f: float) -> None:
    """Beside a sample with cosine 0, whose factor is 1/2, the ratio of two weights is that of their factors."""
    one, other = scored(Adapt(tau=tau), [score, 0.0]).tolist()
    assert one / other == pytest.approx(f / 0.5, rel=1e-6) and one + other == pytest.approx(2)


def test_weights_are_mean_sigmoids_of_the_mean_cosine_with_every_anchor() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, anchors = (F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64)) for n in (7, 4))
    weighter = Adapt(tau=0.2)
    learn(weighter, anchors.mean(0), 0)
    samples = weighter.reduce(replace(observed([1.0] * 7), embeddings=vectors.float()))
    expected = [
        1 / (1 + math.exp(-sum(float(F.cosine_similarity(x, a, dim=0)) for a in anchors) / 4 / 0.2)) for x in vectors
    ]
    assert weighter.weights(samples, 0, 1).tolist() == pytest.approx(
        [7 * f / sum(expected) for f in expected], rel=1e-5
    )


def test_one_number_a_sample_travels() -> None:
    weighter = Adapt()
    learn(weighter, torch.ones(5).double(), 0)
    vectors = weighter.reduce(replace(observed([1.0] * 3), embeddings=torch.ones(3, 5))).embeddings
    assert vectors is not None and vectors.shape == (3, 1)


def test_what_it_asks_for() -> None:
    spec = EmbeddingSpec("position_weighted")
    assert Adapt().requests() == (EmbeddingSignal(spec), TargetEmbeddingSignal(spec, num_targets=0))


def test_clip_bounds_the_factors_before_their_mean_is_taken() -> None:
    assert scored(Adapt(clip=0.5), [2.0, 1.0, 0.0]).tolist() == [1.0, 1.0, 1.0]
    free, clipped = scored(Adapt(), [2.0, -1.0]), scored(Adapt(clip=0.6), [2.0, -1.0])
    assert float(free[0] / free[1]) > float(clipped[0] / clipped[1]) == pytest.approx(0.6 * (1 + math.e), rel=1e-6)


def test_a_sample_without_targets_or_with_a_bad_state_weighs_one_and_changes_nothing_else() -> None:
    samples = replace(observed([1.0] * 4), embeddings=torch.tensor([[0.9], [math.nan], [0.1], [0.5]]))
    samples = replace(samples, num_tokens=torch.tensor([4, 4, 4, 0]))
    found = Adapt().weights(samples, 0, 1).tolist()
    assert found[1] == found[3] == 1.0
    assert [found[0], found[2]] == pytest.approx(scored(Adapt(), [0.9, 0.1]).tolist(), rel=1e-6)


def test_anchors_are_stale_once_a_step_and_only_then() -> None:
    weighter = Adapt(refresh_interval=3)
    assert is_stale(weighter, 4), "before the first weights"
    learn(weighter, torch.ones(2).double(), 4)
    assert [step for step in range(5, 12) if is_stale(weighter, step)] == [6, 9]
    learn(weighter, torch.ones(2).double(), 6)
    assert not is_stale(weighter, 6), "not again for the same step"
    resumed = Adapt(refresh_interval=3)
    resumed.load_state_dict(weighter.state_dict())
    assert not is_stale(resumed, 6) and is_stale(resumed, 9)


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": math.inf}, "tau"),
        ({"clip": -1.0}, "clip"),
        ({"refresh_interval": 0}, "refresh_interval"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"weighter\.adapt\.{key}: .*found"):
        Adapt(**parameters)
