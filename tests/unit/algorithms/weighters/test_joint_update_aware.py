"""Joint weights against golden numbers of DataFlex's iteration, the condition of the maximum, and a general optimiser."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from dataflex_mega.algorithms.requests import EmbeddingSignal, TargetEmbeddingSignal, requests_of
from dataflex_mega.algorithms.weighters.joint_update_aware import JointUpdateAware, solve_exact, solve_fixed_point
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import EmbeddingSpec
from tests.unit.algorithms.examples import observed

Z = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0.6, 0, 0.8]], dtype=torch.float64)
U = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
GOLDEN: list[tuple[dict[str, Any], list[float]]] = [
    ({"fixed_point_iters": 5}, [0.0876955541, 0.8687899152, 0.00023679, 0.0432777407]),
    ({"fixed_point_iters": 200}, [0.0876970395, 0.8687868703, 0.0002367861, 0.0432793042]),
    ({}, [0.0876970395, 0.8687868703, 0.0002367861, 0.0432793042]),
    ({"fixed_point_iters": 5, "objective_mode": "align_only"}, [0.068126758, 0.9131615379, 0.0001035722, 0.018608132]),
    (
        {"fixed_point_iters": 5, "objective_mode": "diverse_only"},
        [0.2390818951, 0.1817304255, 0.3159754552, 0.2632122242],
    ),
    ({"fixed_point_iters": 5, "damping": 0.5}, [0.0925325817, 0.8521839494, 0.0080338673, 0.0472496016]),
    ({"objective_mode": "uniform"}, [0.25, 0.25, 0.25, 0.25]),
]


def learn(weighter: JointUpdateAware, target: torch.Tensor) -> None:
    (request,) = requests_of(weighter, TargetEmbeddingSignal)
    weighter.receive(request, target, 0)


def num_targets(**parameters: Any) -> int:
    (request,) = requests_of(JointUpdateAware(**parameters), TargetEmbeddingSignal)
    return request.num_targets


def weigh(vectors: torch.Tensor, target: torch.Tensor, **parameters: Any) -> torch.Tensor:
    weighter = JointUpdateAware(**parameters)
    learn(weighter, target)
    samples = weighter.reduce(replace(observed([1.0] * len(vectors)), embeddings=vectors))
    return weighter.weights(samples, 0, 1)


@pytest.mark.parametrize(("parameters", "expected"), GOLDEN)
def test_golden_weights(parameters: dict[str, Any], expected: list[float]) -> None:
    assert (weigh(Z, U, **parameters) / 4).tolist() == pytest.approx(expected, rel=1e-6)


def test_where_the_iteration_swings_the_maximum_is_found() -> None:
    """Two pairs of the same vectors: without damping the iteration has a cycle of two, with it the limit is the maximum."""
    pairs, target = torch.eye(2).double()[[0, 0, 1, 1]], torch.tensor([1.0, 0.9], dtype=torch.float64)
    alike, between = pairs @ (target / target.norm()), 0.2 * pairs @ pairs.T
    swings = [solve_fixed_point(alike, between, 0.05, times, 1.0) for times in (100, 101)]
    assert float((swings[0] - swings[1]).abs().max()) > 0.1
    assert (weigh(pairs, target, beta=0.2) / 4)[0].item() == pytest.approx(0.311512, abs=1e-6)
    damped = solve_fixed_point(alike, between, 0.05, 500, 0.3)
    torch.testing.assert_close(solve_exact(alike, between, 0.05), damped, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("beta", "tau"), [(0.1, 0.05), (5.0, 0.01), (300.0, 0.02), (0.0, 0.3)])
def test_no_point_of_the_simplex_is_better(beta: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator, dtype=torch.float64))
    alike, between = vectors @ vectors[0], beta * vectors @ vectors.T
    p = solve_exact(alike, between, tau)
    gradient = alike - between @ p - tau * (p.log() + 1)  # equal everywhere at an inner maximum of a concave function
    assert float(gradient.max() - gradient.min()) < 1e-9 * max(1.0, beta)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12) and bool((p > 0).all())


def test_a_general_optimiser_finds_the_same() -> None:
    alike, between, tau = (Z @ U).numpy(), 0.7 * (Z @ Z.T).numpy(), 0.2

    def lost(logits: np.ndarray) -> float:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return float(-(alike @ p - p @ between @ p / 2 - tau * (p * np.log(p)).sum()))

    found = minimize(lost, np.zeros(4), tol=1e-14)
    expected = np.exp(found.x) / np.exp(found.x).sum()
    p = solve_exact(Z @ U, 0.7 * Z @ Z.T, tau).tolist()
    assert p == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_repeated_sample_shares_its_weight_more_than_without_likeness() -> None:
    twice = torch.cat([Z, Z[1:2]])
    apart, joint = (weigh(twice, U, tau=0.3, objective_mode=mode, beta=2.0) for mode in ("align_only", "full"))
    assert float(joint[1] / joint[2]) < float(apart[1] / apart[2])
    assert joint[1].item() == pytest.approx(joint[4].item(), rel=1e-6)


def test_vectors_that_are_not_numbers_weigh_one_and_are_left_out() -> None:
    spoilt = torch.cat([Z[:2], torch.full((1, 3), math.nan, dtype=torch.float64), Z[2:]])
    found = weigh(spoilt, U)
    assert found[2].item() == 1.0
    assert found[[0, 1, 3, 4]].tolist() == pytest.approx(weigh(Z, U).tolist(), rel=1e-6)
    assert weigh(Z[:1], U).tolist() == [1.0]


def test_spec_and_target_follow_the_parameters() -> None:
    weighter = JointUpdateAware(pooling="mean_pool", embed_layer=2, embed_normalize=False)
    spec = EmbeddingSpec("mean", 2, normalize=False)
    assert weighter.requests() == (EmbeddingSignal(spec), TargetEmbeddingSignal(spec, num_targets()))
    (request,) = requests_of(JointUpdateAware(), EmbeddingSignal)
    assert request.spec.pooling == "last" and request.layer_parameter == "embed_layer"
    assert num_targets() == num_targets(target_num_batches=-1) == 0
    assert num_targets(target_batch_size=4, target_num_batches=3) == 12
    learn(weighter, 2 * U)
    assert weighter.state_dict()["target"].tolist() == (2 * U).tolist(), "as it is"


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"tau": 0.0}, "tau"),
        ({"beta": -0.1}, "beta"),
        ({"damping": 0.5}, "damping"),
        ({"damping": 1.5, "fixed_point_iters": 5}, "damping"),
        ({"fixed_point_iters": 0}, "fixed_point_iters"),
        ({"target_update_step": 0}, "target_update_step"),
        ({"target_batch_size": 0}, "target_batch_size"),
    ],
)
def test_wrong_parameters_name_their_key(parameters: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"weighter\.joint_update_aware\.{key}: .*found"):
        JointUpdateAware(**parameters)
