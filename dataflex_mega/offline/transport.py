"""TSDS: sampling probabilities of candidates from an optimal transport of a task's samples, in closed form.

Liu et al. 2024, "TSDS: Data Selection for Task-Specific Model Finetuning" (arXiv 2410.11303). M queries with the mass 1 / M
each go to candidates at distance d; gamma is the transport and rho_j the density of candidates around candidate j:

    minimise  (alpha / C) sum of gamma d  +  (1 - alpha) M max of rho_j gamma_ij

Given the bound t on rho gamma, a query fills its nearest candidates one after the other up to t / rho. The best t is where
the cost of lowering it further first outweighs the gain, which `tsds_plan` finds by one sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataflex_mega.errors import ConfigError


@dataclass(frozen=True)
class TsdsPlan:
    """The optimal transport, as far as it is needed."""

    probabilities: np.ndarray  # [N] float64, sums to 1
    spread: float  # s: a query's mass is spread over candidates whose 1 / rho sum to about s
    num_filled: np.ndarray  # [M] int64: how many neighbours of each query are filled to the bound


def tsds_plan(distances: np.ndarray, ids: np.ndarray, rho: np.ndarray, alpha: float, scale: float) -> TsdsPlan:
    """The probabilities of all candidates.

    Args:
        distances: [M, K] float64, ascending; infinite where there is no neighbour.
        ids: [M, K] int64 candidates, -1 where there is none.
        rho: [N] float64 > 0; 1 to ignore density.
        alpha: 0 < alpha <= 1; near 1: the nearest candidate only.
        scale: C > 0.

    Raises ConfigError when a query has no neighbour.
    """
    queries, width = distances.shape
    if (ids[:, 0] < 0).any():
        raise ConfigError(f"tsds: query {int(np.flatnonzero(ids[:, 0] < 0)[0])} has no neighbour")
    is_neighbour = ids >= 0
    capacity = np.where(is_neighbour, 1 / rho[ids], 0.0)  # of each neighbour, in units of t
    filled = capacity.cumsum(axis=1)
    # Event (j, k): the first k neighbours of query j are full when the spread reaches filled[j, k - 1]. Its price is that of
    # going on to neighbour k + 1, infinite where there is none.
    price = np.full((queries, width), np.inf)
    added = np.diff(np.where(is_neighbour, distances, 0.0), axis=1) * filled[:, :-1]
    price[:, :-1] = np.where(is_neighbour[:, 1:], added, np.inf)
    row, column = np.divmod(np.arange(price.size), width)
    order = np.lexsort((row, column, filled.ravel()))
    total_price = price.ravel()[order].cumsum() * (alpha / scale)
    stop = int(np.searchsorted(total_price, (1 - alpha) * queries, side="left"))
    num_filled = np.bincount(row[order[:stop]], minlength=queries)
    spread = float(filled.ravel()[order[stop]])
    return TsdsPlan(_probabilities(capacity, ids, num_filled, spread, len(rho)), spread, num_filled)


def _probabilities(
    capacity: np.ndarray, ids: np.ndarray, num_filled: np.ndarray, spread: float, num_samples: int
) -> np.ndarray:
    """[N]: the filled neighbours get their capacity / (M spread), the next one the rest of the query's mass 1 / M."""
    queries, width = ids.shape
    is_filled = np.arange(width) < num_filled[:, None]
    masses = np.where(is_filled, capacity / (queries * spread), 0.0)
    masses[np.arange(queries), num_filled] += np.maximum(1 / queries - masses.sum(axis=1), 0.0)
    probabilities = np.zeros(num_samples)
    positive = masses > 0
    np.add.at(probabilities, ids[positive], masses[positive])
    return probabilities / probabilities.sum()


def kernel_density(distances: np.ndarray, ids: np.ndarray, sigma: float) -> np.ndarray:
    """[U, K] distances of candidates to their neighbours, themselves among them -> [U] float64 rho >= 1.

    The sum of max(0, 1 - d^2 / sigma^2). With sigma 0 it is 1 for all.
    """
    if sigma == 0:
        return np.ones(len(distances))
    near = np.where(ids >= 0, np.maximum(0.0, 1 - np.square(distances) / sigma**2), 0.0)
    return np.maximum(near.sum(axis=1), 1.0)
