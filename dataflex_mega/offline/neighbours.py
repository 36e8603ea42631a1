"""Nearest neighbours of queries among candidates on disk, by faiss: all of them compared, or an inverted file.

Candidates are read in chunks, and each process takes a share of them, so memory does not grow with N; what an inverted
file needs besides, its centres and the rows they are found by, grows with the root of N. A query's lists follow from the
centres alone, so lists that hold one chunk after the other find what lists of all candidates would. What is found is
measured again in float64 and ordered by (distance, id): the result does not depend on chunks or processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dataflex_mega.errors import ConfigError

CHUNK = 1 << 16  # candidates in memory at a time
PADDING = -1  # in place of a neighbour that is not there
TRAINING = 64  # candidates for each list, by which an inverted file is laid out

Gather = Callable[[Any], list[Any]]  # a value of each process, in rank order


class RowArray(Protocol):
    """What is needed of a mapped [N, D] array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class RowSubset:
    """Some rows of a mapped array, read when they are asked for."""

    values: RowArray
    ids: np.ndarray  # [n]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.ids), self.values.shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.values[self.ids[key]]


@dataclass(frozen=True)
class NeighbourSearch:
    """How to search.

    Args:
        index: "exact", or "ivf", which looks into `nprobe` of `nlist` lists.
        nlist: None: half the square root of N.
    """

    index: Literal["exact", "ivf"] = "exact"
    nlist: int | None = None
    nprobe: int = 10
    rank: int = 0
    ranks: int = 1
    gather: Gather = lambda value: [value]
    progress: Callable[[int, int], None] = lambda done, total: None

    def __call__(
        self, candidates: RowArray, queries: np.ndarray, k: int, centres: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """[N, D] candidates, mapped, and [M, D] queries -> ([M, K] float64 distances, ascending; [M, K] int64 ids).

        K is k, or N where that is less. A query for which the lists held fewer is searched exactly. `centres`: what
        `self.centres(candidates)` gave, for several searches of the same candidates.
        """
        if candidates.shape[1] != queries.shape[1]:
            sizes = f"{queries.shape[1]} numbers, the candidates' have {candidates.shape[1]}"
            raise ConfigError(f"queries: vectors of {sizes}; embed both alike")
        k, queries = min(k, len(candidates)), np.ascontiguousarray(queries, dtype=np.float32)
        if self.index == "exact":
            return self._exact(candidates, queries, k)
        centres = self.centres(candidates) if centres is None else centres
        assert centres is not None
        distances, ids = self._by_lists(candidates, queries, k, centres)
        short = np.flatnonzero((ids == PADDING).any(axis=1))
        if len(short):
            distances[short], ids[short] = self._exact(candidates, queries[short], k)
        return distances, ids

    def _share(self, samples: int) -> tuple[int, int]:
        return samples * self.rank // self.ranks, samples * (self.rank + 1) // self.ranks

    def _chunks(self, samples: int) -> list[tuple[int, int]]:
        first, last = self._share(samples)
        return [(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]

    def _exact(self, candidates: RowArray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        def look(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return import_faiss().knn(queries, rows, min(k, len(rows)))

        return self._joined(self._best(candidates, len(queries), k, look), candidates, queries, k)

    def _by_lists(
        self, candidates: RowArray, queries: np.ndarray, k: int, centres: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss = import_faiss()
        quantizer = faiss.IndexFlatL2(centres.shape[1])
        quantizer.add(centres)
        gaps, lists = quantizer.search(queries, min(self.nprobe, len(centres)))

        def look(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            index = faiss.IndexIVFFlat(
                quantizer, centres.shape[1], len(centres)
            )  # one that is emptied keeps its memory
            index.is_trained, index.nprobe = True, lists.shape[1]
            index.add(rows)
            return index.search_preassigned(queries, min(k, len(rows)), lists, gaps)

        return self._joined(self._best(candidates, len(queries), k, look), candidates, queries, k)

    def _best(
        self, candidates: RowArray, queries: int, k: int, look: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of this process's share. `look`: [n, D] float32 rows -> ([M, <= k] distances, [M, <= k] places)."""
        best = np.full((queries, 0), np.inf), np.full((queries, 0), PADDING)
        chunks = self._chunks(len(candidates))
        for done, (start, end) in enumerate(chunks, 1):
            distances, places = look(np.ascontiguousarray(candidates[start:end], dtype=np.float32))
            ids = np.where(places == PADDING, PADDING, places + start)
            best = nearest([best, (distances.astype(np.float64), ids)], k)
            self.progress(done, len(chunks))
        return best

    def centres(self, candidates: RowArray) -> np.ndarray | None:
        """[lists, D] float32, those of the first process on all of them: the lists are then one index cut into shares.

        None where the search is exact.
        """
        if self.index == "exact":
            return None
        lists = min(self.nlist or max(1, math.isqrt(len(candidates)) // 2), len(candidates))
        found = None
        if self.rank == 0:
            count = min(len(candidates), lists * TRAINING)
            rows = candidates[np.arange(count) * len(candidates) // count]
            kmeans = import_faiss().Kmeans(candidates.shape[1], lists, seed=0, min_points_per_centroid=1)
            kmeans.train(np.ascontiguousarray(rows, dtype=np.float32))
            found = kmeans.centroids
        return self.gather(found)[0]

    def _joined(
        self, mine: tuple[np.ndarray, np.ndarray], candidates: RowArray, queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of what all processes found, measured again; each process measures its share of the queries."""
        _, ids = nearest(self.gather(mine), k)
        first, last = self._share(len(queries))
        parts = [exact_distances(candidates, queries[q], ids[q]) for q in range(first, last)]
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


def exact_distances(candidates: RowArray, query: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K] neighbours of one query -> ([K] float64 distances, [K] ids), ascending; PADDING is infinitely far."""
    there = ids[ids != PADDING]
    gaps = np.linalg.norm(candidates[there].astype(np.float64) - query.astype(np.float64), axis=1)
    order = np.lexsort((there, gaps))
    lacking = (0, len(ids) - len(there))
    return np.pad(gaps[order], lacking, constant_values=np.inf), np.pad(there[order], lacking, constant_values=PADDING)


def import_faiss() -> Any:
    """faiss. Raises ConfigError when it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("faiss is not installed; pip install 'dataflex_mega[offline]'") from error
    return faiss
