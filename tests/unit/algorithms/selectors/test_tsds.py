"""Chances from a file: the distribution of what is drawn, whole or by domain, and files that do not fit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex_mega.algorithms.base import DomainInfo
from dataflex_mega.algorithms.selectors._npy import read_npy
from dataflex_mega.algorithms.selectors.tsds import PROBABILITY_DTYPES, Tsds
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.types import SignalTable
from tests.unit.algorithms.examples import generator, update_context

GOLDEN = [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6, 0.0]  # TSDS of two queries and six candidates, alpha 0.6, C 1


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tmp_path / "tsds_probs.npy"


def tsds(path: Path, chances: Any, *sizes: int, **parameters: Any) -> Tsds:
    """A selector of a pool with domains of these sizes, or one of all samples."""
    np.save(path, np.asarray(chances))
    selector, sizes = Tsds(str(path), **parameters), sizes or (len(chances),)
    selector.setup(DomainInfo(tuple(map(str, range(len(sizes)))), sizes, (1 / len(sizes),) * len(sizes)))
    return selector


def scores(selector: Tsds, first: int, last: int) -> torch.Tensor:
    ids = torch.arange(first, last)
    return selector.score(SignalTable(ids, torch.zeros_like(ids)))


def test_scores_are_the_logarithms_of_the_chances(saved: Path) -> None:
    found = scores(tsds(saved, [c * 7 for c in GOLDEN]), 0, 6)
    assert found.exp().tolist() == pytest.approx(GOLDEN, rel=1e-6)
    assert float(found[5]) == -math.inf


def test_chances_below_and_above_what_float32_holds(saved: Path) -> None:
    assert scores(tsds(saved, [1e-200, 3e-200]), 0, 2).exp().tolist() == pytest.approx([0.25, 0.75], rel=1e-5)
    assert scores(tsds(saved, [1e308, 1e308]), 0, 2).exp().tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


def test_pairs_are_drawn_one_after_the_other_without_replacement(saved: Path) -> None:
    """P(i then j) = p_i p_j / (1 - p_i), over all ordered pairs of what has a chance."""
    selector, runs = tsds(saved, GOLDEN), 12_000
    given = scores(selector, 0, 6)
    seen = dict.fromkeys(itertools.permutations(range(5), 2), 0)
    for run in range(runs):
        first, second = selector.select(given, 2, update_context(), generator(run)).tolist()
        seen[first, second] += 1
    expected = {(i, j): runs * GOLDEN[i] * GOLDEN[j] / (1 - GOLDEN[i]) for i, j in seen}
    assert sum(expected.values()) == pytest.approx(runs)
    statistic = sum((seen[pair] - expected[pair]) ** 2 / expected[pair] for pair in seen)
    assert statistic < 19 + 5 * math.sqrt(38)


def test_with_replacement_the_chances_hold_too(saved: Path) -> None:
    selector = tsds(saved, GOLDEN, replacement=True)
    found = selector.select(scores(selector, 0, 6), 20_000, update_context(), generator())
    assert (np.bincount(found, minlength=6) / 20_000).tolist() == pytest.approx(GOLDEN, abs=0.015)


@pytest.mark.parametrize("replacement", [False, True])
def test_within_a_domain_the_chances_are_those_given_the_domain(saved: Path, replacement: bool) -> None:
    """As with a mixer: positions count from the first sample of the domain."""
    selector = tsds(saved, [0.1, 0.2, 0.4, 0.0, 0.2, 0.1], 2, 4, replacement=replacement)
    given, seen = scores(selector, 2, 6), torch.zeros(4)
    for run in range(5000):
        seen[selector.select(given, 1, update_context(), generator(run))] += 1
    assert (seen / 5000).tolist() == pytest.approx([4 / 7, 0, 2 / 7, 1 / 7], abs=0.035)


def test_updates_draw_anew_and_each_can_be_repeated(saved: Path) -> None:
    selector = tsds(saved, np.ones(100))
    given = scores(selector, 0, 100)
    found = [selector.select(given, 10, update_context(), generator(run)).tolist() for run in (0, 1, 0)]
    assert found[0] != found[1] and found[0] == found[2]


def test_more_than_has_a_chance_names_the_numbers(saved: Path) -> None:
    selector = tsds(saved, GOLDEN)
    assert sorted(selector.select(scores(selector, 0, 6), 5, update_context(), generator()).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=f"6 samples wanted, {saved} gives 5 of 6 candidates a chance"):
        selector.select(scores(selector, 0, 6), 6, update_context(), generator())
    with pytest.raises(DataError, match="1 samples wanted, .* gives 0 of 1 candidates a chance"):
        tsds(saved, GOLDEN, replacement=True).select(scores(selector, 5, 6), 1, update_context(), generator())


@pytest.mark.parametrize("kind", ["<f8", "<f4"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_layout_of_the_format_is_read_as_numpy_reads_it(saved: Path, kind: str, version: Any) -> None:
    with saved.open("wb") as stream:
        np.lib.format.write_array(stream, np.linspace(0, 1, 7).astype(kind), version=version)
    assert read_npy(saved, PROBABILITY_DTYPES, ("N",), "numbers").tolist() == np.load(saved).tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], r"expected \[N\] numbers of type <f8 or <f4, found \[3\] of <i8"),
        ([[0.5, 0.5]], r"found \[1, 2\] of <f8"),
        ([0.5, 0.5], r"expected 3 numbers, one per sample of the pool \(0 1, 1 2\), found 2"),
        ([0.5, -0.5, 0.0], r"must be finite and >= 0, found -0\.5 at 1"),
        ([0.5, 0.5, math.nan], r"must be finite and >= 0, found nan at 2"),
        ([0.0, 0.0, 0.0], r"must not be 0 for all 3 samples"),
    ],
)
def test_a_file_that_does_not_fit_is_named(saved: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"{saved}: .*{message}"):
        tsds(saved, content, 1, 2)


def test_a_damaged_file_is_named(saved: Path) -> None:
    np.save(saved, np.ones(3))
    whole, domains = saved.read_bytes(), DomainInfo(("a",), (3,), (1.0,))
    for content, message in [
        (b"0.5\n0.5\n", "found another format"),
        (whole[:-3], "expected 24 bytes .*found 21"),
        (whole[:40], "header of the .npy file cannot be read"),
    ]:
        saved.write_bytes(content)
        with pytest.raises(DataError, match=rf"{saved}: .*{message}"):
            Tsds(str(saved)).setup(domains)


def test_a_missing_file_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"selector\.tsds\.probs_path: no/such\.npy not found \(relative to /"):
        Tsds("no/such.npy").setup(DomainInfo(("a",), (1,), (1.0,)))


def test_a_resumed_run_refuses_other_chances(saved: Path) -> None:
    before = tsds(saved, [0.5, 0.5])
    tsds(saved, [2.0, 2.0]).load_state_dict(before.state_dict())
    with pytest.raises(CheckpointError, match=f"{saved} gives other chances"):
        tsds(saved, [0.5, 0.4]).load_state_dict(before.state_dict())
