"""Signals of candidates, computed where the candidates are: each rank scores its share of the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.types import Batch, SampleObs, SignalTable

KNOWN = frozenset({"loss"})


@dataclass
class Scorer:
    """Scores contiguous shares of the pool in batches that do not depend on the number of ranks."""

    pool: Pool
    collate: Callable[[Sequence[Sample]], Batch]
    forward: Callable[[Batch], SampleObs]  # Engine.sample_losses
    batch_size: int
    rank: int
    ranks: int
    progress: Callable[[int, int], None] | None = None  # (batches done, batches in all)

    def shares(self) -> list[int]:
        """Candidates of each rank: whole batches, the remainder to the first ranks."""
        batches = -(-len(self.pool) // self.batch_size)
        ends = [batches * (r + 1) // self.ranks * self.batch_size for r in range(self.ranks)]
        ends[-1] = len(self.pool)
        ends = [min(end, len(self.pool)) for end in ends]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def table(self, needs: frozenset[str]) -> SignalTable:
        """This rank's share with the signals asked for. Every rank must call it."""
        shares = self.shares()
        first = sum(shares[: self.rank])
        ids = np.arange(first, first + shares[self.rank], dtype=np.int64)
        signals: dict[str, torch.Tensor] = {}
        if "loss" in needs:
            signals["loss"] = self._losses(ids, steps=-(-max(shares) // self.batch_size))
        domain, _ = self.pool.locate(ids)
        return SignalTable(torch.from_numpy(ids), torch.from_numpy(domain.astype(np.int64)), signals)

    def _losses(self, ids: np.ndarray, steps: int) -> torch.Tensor:
        """[n] ids -> [n] float32 mean losses. A rank with fewer batches repeats its last one: sharded layers are called
        together. A rank with none at all borrows sample 0."""
        found = []
        batches = [ids[i : i + self.batch_size] for i in range(0, len(ids), self.batch_size)]
        for step in range(steps):
            mine = batches[step] if step < len(batches) else batches[-1] if batches else np.zeros(1, dtype=np.int64)
            obs = self.forward(self.collate(self.pool.fetch(mine)))
            if step < len(batches):
                found.append(obs.loss.float().cpu())
            if self.progress is not None:
                self.progress(step + 1, steps)
        return torch.cat(found) if found else torch.zeros(0)


def evaluate(scorer: Scorer) -> tuple[torch.Tensor, torch.Tensor]:
    """([k] float64 loss sums, [k] float64 target tokens) of this rank's share of the scorer's pool, by domain."""
    shares = scorer.shares()
    first = sum(shares[: scorer.rank])
    ids = np.arange(first, first + shares[scorer.rank], dtype=np.int64)
    loss, tokens = (torch.zeros(len(scorer.pool.sizes), dtype=torch.float64) for _ in range(2))
    for start in range(0, max(shares), scorer.batch_size):
        mine = ids[start : start + scorer.batch_size]
        fetched = scorer.pool.fetch(mine if len(mine) else np.zeros(1, dtype=np.int64))
        obs = scorer.forward(scorer.collate(fetched))
        if len(mine):
            loss.index_add_(0, obs.domain.cpu(), obs.loss_sum.double().cpu())
            tokens.index_add_(0, obs.domain.cpu(), obs.tokens.double().cpu())
    return loss, tokens
