"""Neighbours in turn: the golden order, an independent walk, and files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.selectors._npy import read_npy
from dataflex_mega.algorithms.selectors.near import INDEX_DTYPES, Near, neighbour_ranks
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import SignalTable
from tests.unit.algorithms.examples import generator, update_context


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "top_indices.npy"


def near(path: Path, neighbours: Any, *sizes: int) -> Near:
    """A selector of a pool with domains of these sizes."""
    np.save(path, np.asarray(neighbours))
    selector = Near(str(path))
    selector.setup(DomainInfo(tuple(map(str, range(len(sizes)))), sizes, (1 / len(sizes),) * len(sizes)))
    return selector


def scores(selector: Near, first: int, last: int) -> torch.Tensor:
    ids = torch.arange(first, last)
    return selector.score(SignalTable(ids, torch.zeros_like(ids)))


def walk(neighbours: list[list[int]]) -> list[int]:
    """Column by column, in plain Python."""
    found: list[int] = []
    for column in range(len(neighbours[0])):
        for row in neighbours:
            if row[column] >= 0 and row[column] not in found:
                found.append(row[column])
    return found


def test_golden_order(saved: Path) -> None:
    selector = near(saved, [[3, 1, 2], [3, 0, 2]], 5)
    found = selector.select(scores(selector, 0, 5), 4, update_context(), generator())
    assert found.tolist() == [3, 1, 0, 2]


def test_order_is_that_of_a_walk_with_padding_and_duplicates(saved: Path) -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        neighbours = rng.integers(-1, 40, (7, 9))
        selector, expected = near(saved, neighbours, 40), walk(neighbours.tolist())
        found = selector.select(scores(selector, 0, 40), len(expected), update_context(), generator())
        assert found.tolist() == expected


def test_every_update_chooses_the_same(saved: Path) -> None:
    selector = near(saved, np.random.default_rng(0).permutation(30).reshape(3, 10), 30)
    found = {
        tuple(selector.select(scores(selector, 0, 30), 9, update_context(s), generator(s)).tolist()) for s in range(5)
    }
    assert len(found) == 1


def test_within_a_domain_its_own_samples_keep_the_order(saved: Path) -> None:
    """As with a mixer: positions count from the first sample of the domain."""
    neighbours = np.random.default_rng(1).integers(0, 50, (6, 20))
    selector = near(saved, neighbours, 20, 30)
    expected = [i - 20 for i in walk(neighbours.tolist()) if i >= 20]
    found = selector.select(scores(selector, 20, 50), len(expected), update_context(), generator())
    assert found.tolist() == expected


def test_samples_that_no_query_names_are_never_chosen(saved: Path) -> None:
    selector = near(saved, [[3, -1], [1, 3]], 6)
    assert scores(selector, 0, 6).isinf().tolist() == [True, False, True, False, True, True]
    with pytest.raises(DataError, match=rf"3 samples wanted, {saved} names 2 of the 6 candidates"):
        selector.select(scores(selector, 0, 6), 3, update_context(), generator())


@pytest.mark.parametrize("kind", ["<i8", "<i4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_layout_of_the_format_is_read_as_numpy_reads_it(saved: Path, kind: str, order: Any, version: Any) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=kind, order=order)
    with saved.open("wb") as stream:
        np.lib.format.write_array(stream, array, version=version)
    assert (
        read_npy(saved, INDEX_DTYPES, ("M", "K"), "whole numbers").tolist() == np.load(saved).tolist() == array.tolist()
    )


def test_ranks_of_padding_alone_are_empty() -> None:
    assert neighbour_ranks(torch.tensor([[-1, -1]]), 3).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0.5, 1.0]], r"expected \[M, K\] numbers of type <i8 or <i4, found \[1, 2\] of <f8"),
        ([1, 2, 3], r"found \[3\] of <i8"),
        (np.zeros((0, 4), dtype=np.int64), r"at least one, found 0"),
        ([[0, 1], [4, 8]], r"in 0\.\.7, those of the pool; found 8 in row 1, column 1 of \[2, 2\]"),
        ([[0, -2]], r"found -2 in row 0, column 1 of \[1, 2\]"),
    ],
)
def test_a_file_that_does_not_fit_is_named(saved: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"{saved}: .*{message}"):
        near(saved, content, 8)


def test_a_damaged_file_is_named(saved: Path) -> None:
    np.save(saved, np.arange(12).reshape(3, 4))
    whole, domains = saved.read_bytes(), DomainInfo(("a",), (12,), (1.0,))
    for content, message in [
        (b"[1, 2]", "found another format"),
        (whole[:-8], "expected 96 bytes .*found 88"),
        (whole[:40], "header of the .npy file cannot be read"),
        (whole[:7], "header of the .npy file cannot be read"),
    ]:
        saved.write_bytes(content)
        with pytest.raises(DataError, match=rf"{saved}: .*{message}"):
            Near(str(saved)).setup(domains)


def test_a_missing_file_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"selector\.near\.indices_path: no/such\.npy not found \(relative to /"):
        Near("no/such.npy").setup(DomainInfo(("a",), (1,), (1.0,)))


def test_a_resumed_run_refuses_another_order(saved: Path) -> None:
    before = near(saved, [[0, 1, 2]], 3)
    near(saved, [[0, 1, 2]], 3).load_state_dict(before.state_dict())
    with pytest.raises(CheckpointError, match=f"{saved} gives another order"):
        near(saved, [[0, 2, 1]], 3).load_state_dict(before.state_dict())
