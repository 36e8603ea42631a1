"""Nearest neighbours of queries among candidates on disk, by faiss: all of them compared, or an inverted file.

Candidates are read in chunks, and each process takes a share of them, so the memory of an exact search does not grow with N.
What is found is measured again in float64 and ordered by (distance, id): the result does not depend on chunks or processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dataflex_mega.errors import ConfigError

CHUNK = 1 << 16  # candidates in memory at a time
PADDING = -1  # in place of a neighbour that is not there
TRAINING = 64  # candidates for each list, by which an inverted file is laid out

Gather = Callable[[Any], list[Any]]  # a value of each process, in rank order


@dataclass(frozen=True)
class Search:
    """How to search.

    Args:
        index: "exact", or "ivf", which looks into `nprobe` of `nlist` lists and holds its share of the candidates in memory.
        nlist: None: half the square root of N.
    """

    index: Literal["exact", "ivf"] = "exact"
    nlist: int | None = None
    nprobe: int = 10
    rank: int = 0
    ranks: int = 1
    gather: Gather = lambda value: [value]
    progress: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, candidates: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, D] candidates, mapped, and [M, D] queries -> ([M, K] float64 distances, ascending; [M, K] int64 ids).

        K is k, or N where that is less. A query for which the lists held fewer is searched exactly.
        """
        if candidates.shape[1] != queries.shape[1]:
            sizes = f"{queries.shape[1]} numbers, the candidates' have {candidates.shape[1]}"
            raise ConfigError(f"queries: vectors of {sizes}; embed both alike")
        k, queries = min(k, len(candidates)), np.ascontiguousarray(queries, dtype=np.float32)
        if self.index == "exact":
            return self._exact(candidates, queries, k)
        distances, ids = self._by_lists(candidates, queries, k)
        short = np.flatnonzero((ids == PADDING).any(axis=1))
        if len(short):
            distances[short], ids[short] = self._exact(candidates, queries[short], k)
        return distances, ids

    def _share(self, samples: int) -> tuple[int, int]:
        return samples * self.rank // self.ranks, samples * (self.rank + 1) // self.ranks

    def _chunks(self, samples: int) -> list[tuple[int, int]]:
        first, last = self._share(samples)
        return [(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]

    def _exact(self, candidates: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = library()
        best = np.full((len(queries), 0), np.inf), np.full((len(queries), 0), PADDING)
        chunks = self._chunks(len(candidates))
        for done, (start, end) in enumerate(chunks, 1):
            rows = np.ascontiguousarray(candidates[start:end], dtype=np.float32)
            distances, ids = faiss.knn(queries, rows, min(k, len(rows)))
            best = nearest([best, (distances.astype(np.float64), ids + start)], k)
            self.progress(done, len(chunks))
        return self._joined(best, candidates, queries, k)

    def _by_lists(self, candidates: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        faiss = library()
        samples, size = candidates.shape
        lists = min(self.nlist or max(1, math.isqrt(samples) // 2), samples)
        centres = self._centres(candidates, lists)
        quantizer = faiss.IndexFlatL2(size)
        quantizer.add(centres)
        index = faiss.IndexIVFFlat(quantizer, size, lists)
        index.is_trained, index.nprobe = True, self.nprobe
        chunks = self._chunks(samples)
        for done, (start, end) in enumerate(chunks, 1):
            index.add_with_ids(np.ascontiguousarray(candidates[start:end], dtype=np.float32), np.arange(start, end))
            self.progress(done, len(chunks))
        distances, ids = index.search(queries, k)
        return self._joined((distances.astype(np.float64), ids), candidates, queries, k)

    def _centres(self, candidates: np.ndarray, lists: int) -> np.ndarray:
        """[lists, D] float32, those of the first process on all of them: the lists are then one index cut into shares."""
        found = None
        if self.rank == 0:
            count = min(len(candidates), lists * TRAINING)
            rows = candidates[np.arange(count) * len(candidates) // count]
            kmeans = library().Kmeans(candidates.shape[1], lists, seed=0, min_points_per_centroid=1)
            kmeans.train(np.ascontiguousarray(rows, dtype=np.float32))
            found = kmeans.centroids
        return self.gather(found)[0]

    def _joined(
        self, mine: tuple[np.ndarray, np.ndarray], candidates: np.ndarray, queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of what all processes found, measured again; each process measures its share of the queries."""
        _, ids = nearest(self.gather(mine), k)
        first, last = self._share(len(queries))
        parts = [measured(candidates, queries[q], ids[q]) for q in range(first, last)]
        empty = np.zeros((0, ids.shape[1]))
        shares = self.gather((
            np.stack([d for d, _ in parts]) if parts else empty, np.stack([i for _, i in parts]) if parts else empty
        ))  # fmt: skip
        return np.concatenate([d for d, _ in shares]), np.concatenate([i for _, i in shares]).astype(np.int64)


def nearest(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """([M, K_i] distances, [M, K_i] ids) of several searches -> the k smallest by (distance, id), PADDING last."""
    distances = np.concatenate([np.where(ids == PADDING, np.inf, d) for d, ids in parts], axis=1)
    ids = np.concatenate([ids for _, ids in parts], axis=1)
    if distances.shape[1] < k:
        lacking = ((0, 0), (0, k - distances.shape[1]))
        distances = np.pad(distances, lacking, constant_values=np.inf)
        ids = np.pad(ids, lacking, constant_values=PADDING)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def measured(candidates: np.ndarray, query: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K] neighbours of one query -> ([K] float64 distances, [K] ids), ascending; PADDING is infinitely far."""
    there = ids[ids != PADDING]
    gaps = np.linalg.norm(candidates[there].astype(np.float64) - query.astype(np.float64), axis=1)
    order = np.lexsort((there, gaps))
    lacking = (0, len(ids) - len(there))
    return np.pad(gaps[order], lacking, constant_values=np.inf), np.pad(there[order], lacking, constant_values=PADDING)


def library() -> Any:
    """faiss. Raises ConfigError when it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("faiss is not installed; pip install 'dataflex_mega[offline]'") from error
    return faiss
