"""Nearest neighbours of queries among candidates on disk, by faiss: exhaustive, or with an inverted file.

Each process reads its part of the candidates in chunks, so memory does not grow with N; the centres of an inverted file and
the rows that they are trained on grow with the root of N. A query's lists follow from the centres alone, so lists that hold
one chunk after the other give the neighbours that lists of all candidates would. The distances of the neighbours are
computed again in float64 and ordered by (distance, id): the result does not depend on chunks or processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from dataflex_mega.errors import ConfigError

CHUNK = 1 << 16  # candidates in memory at a time
PADDING = -1  # the id where there is no neighbour
TRAINING_ROWS_PER_LIST = 64  # on which the centres of an inverted file are trained

AllGather = Callable[[Any], list[Any]]  # a value of each process, in rank order


class RowArray(Protocol):
    """The part of a memory-mapped [N, D] array that is used."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class RowSubset:
    """Some rows of a memory-mapped array, read on access."""

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
    """A search, the candidates divided over processes.

    Args:
        index: "exact", or "ivf", which searches `nprobe` of `nlist` lists.
        nlist: None: half the square root of N.
    """

    index: Literal["exact", "ivf"] = "exact"
    nlist: int | None = None
    nprobe: int = 10
    rank: int = 0
    world_size: int = 1
    all_gather: AllGather = lambda value: [value]
    progress: Callable[[int, int], None] = lambda done, total: None

    def __call__(
        self, candidates: RowArray, queries: np.ndarray, k: int, centres: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """[N, D] candidates, memory-mapped, and [M, D] queries -> ([M, K] float64 distances, ascending; [M, K] int64 ids).

        K is k, or N where that is less. A query for which the lists hold fewer is searched exhaustively. `centres`: the
        result of `train_centres(candidates)`, for several searches of the same candidates.
        """
        if candidates.shape[1] != queries.shape[1]:
            sizes = f"{queries.shape[1]} numbers, the candidates' have {candidates.shape[1]}"
            raise ConfigError(f"queries: vectors of {sizes}; embed both alike")
        k, queries = min(k, len(candidates)), np.ascontiguousarray(queries, dtype=np.float32)
        if self.index == "exact":
            return self._search_exact(candidates, queries, k)
        centres = self.train_centres(candidates) if centres is None else centres
        assert centres is not None
        distances, ids = self._search_lists(candidates, queries, k, centres)
        short = np.flatnonzero((ids == PADDING).any(axis=1))
        if len(short):
            distances[short], ids[short] = self._search_exact(candidates, queries[short], k)
        return distances, ids

    def _local_range(self, count: int) -> tuple[int, int]:
        """The part [first, last) of `count` items that this process works on."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def _chunks(self, num_candidates: int) -> list[tuple[int, int]]:
        first, last = self._local_range(num_candidates)
        return [(start, min(start + CHUNK, last)) for start in range(first, last, CHUNK)]

    def _search_exact(self, candidates: RowArray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        def search_chunk(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return import_faiss().knn(queries, rows, min(k, len(rows)))

        return self._merge_processes(
            self._local_best(candidates, len(queries), k, search_chunk), candidates, queries, k
        )

    def _search_lists(
        self, candidates: RowArray, queries: np.ndarray, k: int, centres: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss = import_faiss()
        quantizer = faiss.IndexFlatL2(centres.shape[1])
        quantizer.add(centres)
        gaps, lists = quantizer.search(queries, min(self.nprobe, len(centres)))

        def search_chunk(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            index = faiss.IndexIVFFlat(
                quantizer, centres.shape[1], len(centres)
            )  # one that is emptied keeps its memory
            index.is_trained, index.nprobe = True, lists.shape[1]
            index.add(rows)
            return index.search_preassigned(queries, min(k, len(rows)), lists, gaps)

        return self._merge_processes(
            self._local_best(candidates, len(queries), k, search_chunk), candidates, queries, k
        )

    def _local_best(
        self,
        candidates: RowArray,
        num_queries: int,
        k: int,
        search_chunk: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of this process's candidates. `search_chunk`: [n, D] float32 rows -> ([M, <= k] distances, rows)."""
        best = np.full((num_queries, 0), np.inf), np.full((num_queries, 0), PADDING)
        chunks = self._chunks(len(candidates))
        for done, (start, end) in enumerate(chunks, 1):
            distances, rows = search_chunk(np.ascontiguousarray(candidates[start:end], dtype=np.float32))
            ids = np.where(rows == PADDING, PADDING, rows + start)
            best = merge_nearest([best, (distances.astype(np.float64), ids)], k)
            self.progress(done, len(chunks))
        return best

    def train_centres(self, candidates: RowArray) -> np.ndarray | None:
        """[lists, D] float32, trained by the first process and equal on all: the lists of all processes form one index.

        None where the search is exhaustive.
        """
        if self.index == "exact":
            return None
        lists = min(self.nlist or max(1, math.isqrt(len(candidates)) // 2), len(candidates))
        centres = None
        if self.rank == 0:
            count = min(len(candidates), lists * TRAINING_ROWS_PER_LIST)
            rows = candidates[np.arange(count) * len(candidates) // count]
            kmeans = import_faiss().Kmeans(candidates.shape[1], lists, seed=0, min_points_per_centroid=1)
            kmeans.train(np.ascontiguousarray(rows, dtype=np.float32))
            centres = kmeans.centroids
        return self.all_gather(centres)[0]

    def _merge_processes(
        self, local_best: tuple[np.ndarray, np.ndarray], candidates: RowArray, queries: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best of all processes, with exact distances; each process computes those of its part of the queries."""
        _, ids = merge_nearest(self.all_gather(local_best), k)
        first, last = self._local_range(len(queries))
        local = [exact_distances(candidates, queries[q], ids[q]) for q in range(first, last)]
        empty = np.zeros((0, ids.shape[1]))
        gathered = self.all_gather((
            np.stack([d for d, _ in local]) if local else empty, np.stack([i for _, i in local]) if local else empty
        ))  # fmt: skip
        return np.concatenate([d for d, _ in gathered]), np.concatenate([i for _, i in gathered]).astype(np.int64)


def merge_nearest(parts: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """([M, K_i] distances, [M, K_i] ids) of several searches -> the k smallest by (distance, id), PADDING last."""
    distances = np.concatenate([np.where(ids == PADDING, np.inf, d) for d, ids in parts], axis=1)
    ids = np.concatenate([ids for _, ids in parts], axis=1)
    if distances.shape[1] < k:
        padding = ((0, 0), (0, k - distances.shape[1]))
        distances = np.pad(distances, padding, constant_values=np.inf)
        ids = np.pad(ids, padding, constant_values=PADDING)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def exact_distances(candidates: RowArray, query: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K] neighbours of one query -> ([K] float64 distances, [K] ids), ascending; PADDING is infinitely far."""
    known = ids[ids != PADDING]
    distances = np.linalg.norm(candidates[known].astype(np.float64) - query.astype(np.float64), axis=1)
    order = np.lexsort((known, distances))
    padding = (0, len(ids) - len(known))
    distances = np.pad(distances[order], padding, constant_values=np.inf)
    return distances, np.pad(known[order], padding, constant_values=PADDING)


def import_faiss() -> Any:
    """The module faiss. Raises ConfigError when it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ConfigError("faiss is not installed; pip install 'dataflex_mega[offline]'") from error
    return faiss
