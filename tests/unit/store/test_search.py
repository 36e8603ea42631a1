"""Scores from a store against NumPy's, whatever the number of ranks; the best of all ranks from the best of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataflex_mega.store import build, search
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout

LAYOUT = StoreLayout(num_samples=75, width=12, num_shards=2, block_size=8)


class Pretend:
    """Ranks one after the other: gathering returns what the others were told to send."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts

    def all_gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor:
        assert [len(part) for part in self.parts] == counts
        assert any(part.shape == rows.shape and torch.equal(part, rows) for part in self.parts)
        return torch.cat(self.parts)


class Recording:
    """Keeps what a rank sends."""

    def all_gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor:
        self.sent = rows
        return rows


@pytest.fixture
def store(tmp_path: Path) -> GradientStore:
    made = build.create_or_resume(tmp_path, {}, LAYOUT)
    torch.manual_seed(0)
    for shard in range(2):
        writer = build.ShardWriter(tmp_path, made, shard)
        for block in writer.missing_blocks:
            values = torch.randn(len(made.ids_of_block(block)), 12)
            values[0] = 0 if block == 3 else values[0]
            writer.write(values)
        writer.close()
    build.finalize(tmp_path, {}, made)
    return GradientStore(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 4, 11])
def test_scores_are_numpys_cosines_on_any_number_of_ranks(store: GradientStore, ranks: int) -> None:
    directions = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    parts = [search.dot_products(store, directions, rank, ranks) for rank in range(ranks)]
    assert [len(norm2) for _, norm2 in parts] == search.rank_counts(store, ranks)
    found = torch.cat([search.max_cosine(*part) for part in parts]).numpy()
    alone = torch.cat([search.streamed_max_cosine(store, directions, rank, ranks) for rank in range(ranks)]).numpy()
    np.testing.assert_array_equal(alone, found)
    every = store.fetch(np.arange(75)).double().numpy()
    length = np.linalg.norm(every, axis=1)
    cosine = (every @ directions.double().numpy().T).max(axis=1) / np.where(length > 0, length, 1)
    np.testing.assert_allclose(found, cosine, rtol=1e-5, atol=1e-6)
    assert found[24] == 0 and np.isfinite(found).all(), "a row of zeros"


@pytest.mark.parametrize("chunk", [4, 1 << 16])
@pytest.mark.parametrize("count", [1, 7, 75, 200])
def test_top_k_of_all_ranks_is_top_k_of_everything(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHUNK", chunk)
    rng = np.random.default_rng(3)
    scores = torch.from_numpy(rng.integers(0, 9, 75).astype(np.float32))  # many ties
    scores[5] = float("nan")
    cuts = [range(0, 31), range(31, 31), range(31, 40), range(40, 75)]
    sent = []
    counts = [len(cut) for cut in cuts]
    for rank, cut in enumerate(cuts):
        recording = Recording()
        search.top_k(scores[cut.start : cut.stop], rank, counts, count, recording)
        sent.append(recording.sent)
        assert recording.sent.numel() * recording.sent.element_size() == 16 * min(count, len(cut))
    values = [-np.inf if np.isnan(x) else x for x in scores.tolist()]
    expected = sorted(range(75), key=lambda i: (-values[i], i))[:count]
    for rank, cut in enumerate(cuts):
        ids, best = search.top_k(scores[cut.start : cut.stop], rank, counts, count, Pretend(sent))
        assert ids.tolist() == expected and best.tolist() == [values[i] for i in expected]
