"""TSDS: chances of candidates from an optimal transport of a task's samples, in closed form.

Liu et al. 2024, "TSDS: Data Selection for Task-Specific Model Finetuning" (arXiv 2410.11303). M queries with the mass 1 / M
each go to candidates at distance d; gamma is the transport and rho_j how crowded candidate j's surroundings are:

    minimise  (alpha / C) sum of gamma d  +  (1 - alpha) M max of rho_j gamma_ij

Given the bound t on rho gamma, a query fills its nearest candidates one after the other up to t / rho. The best t is where
the cost of lowering it further first outweighs the gain, which the lines of `plan` find by one sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataflex_mega.errors import ConfigError


@dataclass(frozen=True)
class TsdsPlan:
    """What a transport came to."""

    chances: np.ndarray  # [N] float64, sums to 1
    spread: float  # s: a query's mass is spread over candidates whose 1 / rho sum to about s
    used: np.ndarray  # [M] int64: how many neighbours of each query are filled to the bound


def plan(distances: np.ndarray, ids: np.ndarray, rho: np.ndarray, alpha: float, scale: float) -> TsdsPlan:
    """The chances of all candidates.

    Args:
        distances: [M, K] float64, ascending; infinite for neighbours that are not there.
        ids: [M, K] int64 candidates, -1 where there is none.
        rho: [N] float64 > 0; 1 for no regard to crowding.
        alpha: 0 < alpha <= 1; near 1: the nearest candidate only.
        scale: C > 0.

    Raises ConfigError when a query has no neighbour.
    """
    queries, width = distances.shape
    if (ids[:, 0] < 0).any():
        raise ConfigError(f"tsds: query {int(np.flatnonzero(ids[:, 0] < 0)[0])} has no neighbour")
    there = ids >= 0
    takes = np.where(there, 1 / rho[ids], 0.0)  # of t, by each neighbour
    filled = takes.cumsum(axis=1)
    # Event (j, k): the first k neighbours of query j are full when the spread reaches filled[j, k - 1]. Its price is that of
    # going on to neighbour k + 1; where there is none, nothing pays for it.
    price = np.full((queries, width), np.inf)
    further = np.diff(np.where(there, distances, 0.0), axis=1) * filled[:, :-1]
    price[:, :-1] = np.where(there[:, 1:], further, np.inf)
    row, column = np.divmod(np.arange(price.size), width)
    order = np.lexsort((row, column, filled.ravel()))
    paid = price.ravel()[order].cumsum() * (alpha / scale)
    stop = int(np.searchsorted(paid, (1 - alpha) * queries, side="left"))
    used = np.bincount(row[order[:stop]], minlength=queries)
    spread = float(filled.ravel()[order[stop]])
    return TsdsPlan(_chances(takes, ids, used, spread, len(rho)), spread, used)


def _chances(takes: np.ndarray, ids: np.ndarray, used: np.ndarray, spread: float, samples: int) -> np.ndarray:
    """[N]: the first `used` neighbours get their part of 1 / (M spread), the next one what is left of 1 / M."""
    queries, width = ids.shape
    full = np.arange(width) < used[:, None]
    masses = np.where(full, takes / (queries * spread), 0.0)
    masses[np.arange(queries), used] += np.maximum(1 / queries - masses.sum(axis=1), 0.0)
    chances = np.zeros(samples)
    there = masses > 0
    np.add.at(chances, ids[there], masses[there])
    return chances / chances.sum()


def crowding(distances: np.ndarray, ids: np.ndarray, sigma: float) -> np.ndarray:
    """[U, K] distances of candidates to their neighbours, themselves among them -> [U] float64 rho >= 1.

    A kernel estimate of their density: the sum of max(0, 1 - d^2 / sigma^2). With sigma 0 it is 1 for all.
    """
    if sigma == 0:
        return np.ones(len(distances))
    near = np.where(ids >= 0, np.maximum(0.0, 1 - np.square(distances) / sigma**2), 0.0)
    return np.maximum(near.sum(axis=1), 1.0)
