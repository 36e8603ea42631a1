"""Neighbours against brute force in numpy, whatever the chunks, the index and the number of processes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_mega.errors import ConfigError
from dataflex_mega.offline import neighbours
from dataflex_mega.offline.neighbours import NeighbourSearch, RowSubset, merge_nearest
from tests.unit.signals.test_clusters import Threads

pytest.importorskip("faiss")


def vectors(count, seed, size=12):
    made = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def brute(candidates, queries, k):
    gaps = np.linalg.norm(queries[:, None].astype(np.float64) - candidates[None].astype(np.float64), axis=2)
    order = np.lexsort((np.broadcast_to(np.arange(len(candidates)), gaps.shape), gaps), axis=1)[:, :k]
    return np.take_along_axis(gaps, order, 1), order


def same(found, expected):
    assert found[1].tolist() == expected[1].tolist() and found[1].dtype == np.int64
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_exact_is_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(neighbours, "CHUNK", chunk)
    candidates, queries = vectors(300, 0), vectors(11, 1)
    same(NeighbourSearch()(candidates, queries, 40), brute(candidates, queries, 40))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("index", ["exact", "ivf"])
def test_processes_share_the_work_and_find_the_same(monkeypatch, world_size, index):
    monkeypatch.setattr(neighbours, "CHUNK", 50)
    candidates, queries = vectors(400, 2), vectors(5, 3)
    search = NeighbourSearch(index, nlist=8, nprobe=3)
    whole = search(candidates, queries, 25)
    threads = Threads(world_size)

    def work(collectives):
        rank = collectives.parallel_info.dp_rank
        local = replace(search, rank=rank, world_size=world_size, all_gather=lambda value: threads.swap(rank, value))
        return local(candidates, queries, 25)

    for found in threads.run(work):
        same(found, whole)


def test_an_inverted_file_holds_a_chunk_and_finds_what_one_of_all_finds(monkeypatch):
    import faiss

    candidates, queries = vectors(400, 2), vectors(5, 3)
    search = NeighbourSearch("ivf", nlist=8, nprobe=3)
    whole = search(candidates, queries, 25)
    made = []

    def inverted(*arguments):
        made.append(faiss.IndexIVFFlat(*arguments))
        return made[-1]

    held = SimpleNamespace(knn=faiss.knn, Kmeans=faiss.Kmeans, IndexFlatL2=faiss.IndexFlatL2, IndexIVFFlat=inverted)
    monkeypatch.setattr(neighbours, "import_faiss", lambda: held)
    monkeypatch.setattr(neighbours, "CHUNK", 23)
    same(search(candidates, queries, 25), whole)
    assert [index.ntotal for index in made] == [23] * (400 // 23) + [400 % 23], "each a chunk alone"


def test_a_subset_of_rows_is_searched_as_if_it_were_an_array():
    candidates, queries, ids = vectors(90, 4), vectors(3, 5), np.arange(5, 90, 7)
    for index in ("exact", "ivf"):
        search = NeighbourSearch(index, nlist=3, nprobe=2)
        subset = RowSubset(candidates, ids)
        found = search(subset, queries, 6, search.train_centres(subset))
        same(found, search(candidates[ids], queries, 6))


def test_an_inverted_file_with_all_lists_is_brute_force():
    candidates, queries = vectors(500, 4), vectors(9, 5)
    same(NeighbourSearch("ivf", nlist=10, nprobe=10)(candidates, queries, 30), brute(candidates, queries, 30))


def test_a_query_that_finds_too_few_is_searched_exactly():
    """One list of about ten candidates cannot give forty neighbours."""
    candidates, queries = vectors(300, 6), vectors(9, 7)
    same(NeighbourSearch("ivf", nlist=30, nprobe=1)(candidates, queries, 40), brute(candidates, queries, 40))


def test_few_lists_find_nearly_the_nearest():
    candidates, queries = vectors(2000, 8, 4), vectors(20, 9, 4)
    found = NeighbourSearch("ivf")(candidates, queries, 10)[1]
    expected = brute(candidates, queries, 10)[1]
    hits = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    assert np.mean(hits) > 0.9


def test_more_neighbours_than_candidates_is_all_of_them_and_equal_ones_go_by_id():
    candidates, queries = np.repeat(vectors(3, 10), 2, axis=0), vectors(2, 11)
    found = NeighbourSearch()(candidates, queries, 50)
    same(found, brute(candidates, queries, 6))
    assert found[1].shape == (2, 6)


def test_merging_puts_what_is_not_there_last():
    one = np.array([[0.5, 0.1]]), np.array([[7, -1]])
    two = np.array([[0.5, 0.2]]), np.array([[3, 9]])
    distances, ids = merge_nearest([one, two], 5)
    assert ids.tolist() == [[9, 3, 7, -1, -1]] and distances[0, :3].tolist() == [0.2, 0.5, 0.5]


def test_vectors_of_different_encoders_are_refused():
    with pytest.raises(ConfigError, match="vectors of 8 numbers, the candidates' have 12; embed both alike"):
        NeighbourSearch()(vectors(5, 0), vectors(2, 0, 8), 3)
