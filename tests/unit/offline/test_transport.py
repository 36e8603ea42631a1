"""TSDS's probabilities: golden numbers, the authors' heap in plain Python, and a linear program."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from scipy.optimize import linprog

from dataflex_mega.errors import ConfigError
from dataflex_mega.offline.transport import kernel_density, tsds_plan

D = np.array([[0.1, 0.2, 0.3, 0.9, 1.0], [0.2, 0.4, 0.5, 0.6, 2.0]])
NN = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 5, 1]])


@pytest.mark.parametrize(
    ("alpha", "scale", "rho", "spread", "expected"),
    [
        (0.6, 5.0, [1, 1, 1, 1, 1, 1], 4, [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 8, 1 / 8]),
        (0.6, 1.0, [1, 1, 1, 1, 1, 1], 3, [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6, 0]),
        (0.9, 1.0, [1, 1, 1, 1, 1, 1], 1, [1 / 2, 0, 0, 0, 1 / 2, 0]),
        (0.6, 1.0, [2, 2, 1, 1, 1, 1], 2, [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4, 0]),
    ],
)
def test_golden_probabilities(alpha, scale, rho, spread, expected):
    found = tsds_plan(D, NN, np.array(rho, dtype=float), alpha, scale)
    assert found.spread == spread and found.probabilities.tolist() == pytest.approx(expected, abs=1e-12)


def by_heap(distances, ids, rho, alpha, scale, samples):
    """The published procedure: pop the smallest spread, add up costs, stop."""
    queries, width = distances.shape
    costs, used, spread = [0.0] * queries, [0] * queries, 0.0
    heap = [(1 / rho[ids[j, 0]], 1, j) for j in range(queries)]
    heapq.heapify(heap)
    while heap:
        spread, k, j = heapq.heappop(heap)
        if k >= width:
            break  # nothing is left to go on to
        costs[j] = distances[j, k] * spread - sum(distances[j, i] / rho[ids[j, i]] for i in range(k))
        if alpha / scale * sum(costs) >= (1 - alpha) * queries:
            break
        used[j] = k
        heapq.heappush(heap, (spread + 1 / rho[ids[j, k]], k + 1, j))
    probabilities = np.zeros(samples)
    for j in range(queries):
        given = 0.0
        for i in range(used[j]):
            probabilities[ids[j, i]] += 1 / (queries * spread * rho[ids[j, i]])
            given += 1 / (queries * spread * rho[ids[j, i]])
        probabilities[ids[j, used[j]]] += max(1 / queries - given, 0.0)
    return probabilities


def case(seed, queries=3, samples=9, width=9):
    rng = np.random.default_rng(seed)
    every = rng.random((queries, samples)) + 0.05
    ids = every.argsort(axis=1)[:, :width]
    return every, np.take_along_axis(every, ids, 1), ids, 1 + rng.random(samples) * rng.integers(0, 3)


@pytest.mark.parametrize("seed", range(12))
def test_probabilities_are_those_of_the_heap(seed):
    _, distances, ids, rho = case(seed, queries=5, samples=30, width=20)
    alpha, scale = 0.4 + 0.05 * (seed % 8), (0.5, 1.0, 3.0)[seed % 3]
    expected = by_heap(distances, ids, rho, alpha, scale, 30)
    assert tsds_plan(distances, ids, rho, alpha, scale).probabilities == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("alpha", "scale"), [(0.6, 1.0), (0.8, 1.0), (0.5, 0.4)])
def test_no_transport_is_cheaper_by_a_linear_program(seed, alpha, scale):
    """Variables gamma [3, 9] and t >= rho gamma: the program's optimum is the cost of the closed form."""
    every, distances, ids, rho = case(seed)
    queries, samples = every.shape
    count = queries * samples
    cost = np.append(alpha / scale * every.ravel(), (1 - alpha) * queries)
    above = np.hstack([np.diag(np.tile(rho, queries)), -np.ones((count, 1))])
    rows = np.hstack([np.kron(np.eye(queries), np.ones((1, samples))), np.zeros((queries, 1))])
    best = linprog(cost, above, np.zeros(count), rows, np.full(queries, 1 / queries))
    found = tsds_plan(distances, ids, rho, alpha, scale)
    masses = np.zeros_like(every)
    for j in range(queries):
        alone = np.zeros(samples)
        for i in range(found.num_filled[j]):
            alone[ids[j, i]] = 1 / (queries * found.spread * rho[ids[j, i]])
        alone[ids[j, found.num_filled[j]]] += 1 / queries - alone.sum()
        masses[j] = alone
    assert masses.sum(axis=0) == pytest.approx(found.probabilities, abs=1e-12)
    ours = alpha / scale * (masses * every).sum() + (1 - alpha) * queries * (rho * masses).max()
    assert ours == pytest.approx(best.fun, rel=1e-9)


def test_alpha_moves_between_the_nearest_and_all():
    _, distances, ids, _ = case(3)
    near = tsds_plan(distances, ids, np.ones(9), 1.0, 1.0).probabilities
    expected = np.bincount(ids[:, 0], minlength=9) / 3
    assert near == pytest.approx(expected)
    wide = tsds_plan(distances, ids, np.ones(9), 1e-9, 1.0).probabilities
    assert wide == pytest.approx(np.full(9, 1 / 9), abs=0.05) and wide.sum() == pytest.approx(1)


def test_neighbours_that_are_not_there_get_nothing():
    ids = np.array([[0, 1, -1, -1], [2, 3, 4, 5]])
    distances = np.array([[0.1, 0.2, np.inf, np.inf], [0.1, 0.2, 0.3, 0.4]])
    found = tsds_plan(distances, ids, np.ones(8), 0.01, 1.0)
    assert np.isfinite(found.probabilities).all() and found.probabilities[:2].sum() == pytest.approx(0.5)
    assert found.probabilities[6:].tolist() == [0, 0]
    with pytest.raises(ConfigError, match="query 1 has no neighbour"):
        tsds_plan(np.full((2, 1), 0.1), np.array([[0], [-1]]), np.ones(2), 0.5, 1.0)
    assert tsds_plan(np.array([[0.3]]), np.array([[1]]), np.ones(2), 0.5, 1.0).probabilities.tolist() == [0, 1]


def test_copies_share_the_probability_of_the_original():
    """A candidate that is there three times, with its kernel density, has about the mass it has alone."""
    distances, ids = np.array([[0.1, 0.4, 0.5, 0.6]]), np.array([[0, 1, 2, 3]])
    alone = tsds_plan(distances, ids, np.ones(4), 0.6, 1.0).probabilities
    thrice = tsds_plan(
        np.array([[0.1, 0.1, 0.1, 0.4, 0.5, 0.6]]),
        np.array([[0, 4, 5, 1, 2, 3]]),
        np.array([3, 1, 1, 1, 3, 3.0]),
        0.6,
        1.0,
    ).probabilities
    assert thrice[[0, 4, 5]].sum() == pytest.approx(alone[0]) and thrice[[0, 4, 5]] == pytest.approx(alone[0] / 3)


def test_the_density_is_the_sum_of_kernels():
    distances, ids = np.array([[0.0, 0.3, 0.6, 0.9], [0.0, 2.0, 2.0, np.inf]]), np.array([[0, 1, 2, 3], [4, 0, 1, -1]])
    assert kernel_density(distances, ids, 0.75) == pytest.approx([1 + (1 - 0.16) + (1 - 0.64), 1.0])
    assert kernel_density(distances, ids, 0).tolist() == [1, 1]
