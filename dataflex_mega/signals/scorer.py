"""Signals of candidates, computed where the candidates are: each rank scores its share of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from dataflex_mega.data.pool import Pool, Sample
from dataflex_mega.types import IGNORED, Batch, SampleObs, SignalTable

GRADIENTS = {"gradient_adam": True, "gradient_sgd": False}  # signal -> whether Adam's moments precondition
KNOWN = frozenset({"loss", "reference_loss", *GRADIENTS})


class GradientScorer(Protocol):
    """What is needed of engines.fsdp.gradients.GradientScorer."""

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Any: ...
    def score(self, batch: Batch, directions: Any) -> tuple[torch.Tensor, torch.Tensor]: ...


class Provider(Protocol):
    """Makes further signals; providers.registry says who makes which."""

    def __call__(self, scorer: Scorer, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """[n] global ids of this rank's candidates -> signals by name, n rows each, on the CPU.

        Called on every rank at the same time, also on one without candidates. A provider that runs the model does so over
        `scorer.batches(ids)`, which is equally long everywhere.
        """
        ...


@dataclass(frozen=True)
class Targets:
    """What gradient scores compare candidates with: a group of samples for each sub-task."""

    groups: Sequence[Pool]
    scorer: Callable[[bool], GradientScorer]  # whether Adam -> a scorer of the model of now
    collate: Callable[[Sequence[Sample]], Batch]  # one sample a row


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
    targets: Targets | None = None
    providers: Mapping[str, Provider] = field(default_factory=dict)  # by what a selector's `needs` calls the signal
    step: int = 0  # optimizer steps done, set before every table

    candidates: np.ndarray | None = field(default=None, init=False)  # sorted ids, or None for the whole pool

    def only(self, ids: torch.Tensor) -> Scorer:
        """A scorer of these samples alone, [n] ids in ascending order."""
        other = replace(self)
        other.consider(ids.numpy())
        return other

    def domains(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] global ids -> [n] int64 domains."""
        return torch.from_numpy(self.pool.locate(ids.numpy())[0].astype(np.int64))

    def consider(self, ids: np.ndarray) -> None:
        """Score these samples of the pool from now on."""
        self.candidates = ids

    def shares(self) -> list[int]:
        """Candidates of each rank: whole batches, the remainder to the first ranks."""
        total = len(self.pool) if self.candidates is None else len(self.candidates)
        batches = -(-total // self.batch_size)
        ends = [batches * (r + 1) // self.ranks * self.batch_size for r in range(self.ranks)]
        ends[-1] = total
        ends = [min(end, total) for end in ends]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def table(self, needs: frozenset[str]) -> SignalTable:
        """This rank's share with the signals asked for. Every rank must call it."""
        shares = self.shares()
        first = sum(shares[: self.rank])
        ids = np.arange(first, first + shares[self.rank], dtype=np.int64)
        if self.candidates is not None:
            ids = self.candidates[ids]
        signals: dict[str, torch.Tensor] = {}
        steps = -(-max(shares) // self.batch_size)
        if "loss" in needs:
            signals["loss"] = self._losses(ids, steps)
        if "reference_loss" in needs:
            signals["reference_loss"] = self._references(ids)
        for name in sorted(needs & set(GRADIENTS)):
            signals.update(self._gradients(ids, steps, GRADIENTS[name]))
        for name in sorted(needs & set(self.providers)):
            signals.update(self.providers[name](self, ids))
        domain, _ = self.pool.locate(ids)
        return SignalTable(torch.from_numpy(ids), torch.from_numpy(domain.astype(np.int64)), signals)

    def _losses(self, ids: np.ndarray, steps: int) -> torch.Tensor:
        """[n] ids -> [n] float32 mean losses."""
        found = [self.forward(self.collate(samples)).loss.float().cpu() for samples, _ in self.batches(ids, steps)]
        return torch.cat(found)[: len(ids)]

    def _references(self, ids: np.ndarray) -> torch.Tensor:
        """[n] ids -> [n] float32 mean losses of the reference model, 0 for a sample without targets; no forward pass."""
        found = np.zeros(len(ids), dtype=np.float32)
        for start in range(0, len(ids), self.batch_size):
            for place, sample in enumerate(self.pool.fetch(ids[start : start + self.batch_size]), start):
                assert sample.reference is not None, "attached to the pool when the run was built"
                targets = sample.labels[1:] != IGNORED
                if targets.any():
                    found[place] = sample.reference[:-1][targets].mean(dtype=np.float64)
        return torch.from_numpy(found)

    def _gradients(self, ids: np.ndarray, steps: int, adam: bool) -> dict[str, torch.Tensor]:
        """[n] ids -> dot [n, S] with each group's direction and norm2 [n]."""
        assert self.targets is not None, "checked when the run was built"
        scorer = self.targets.scorer(adam)
        return self.compared(scorer, scorer.directions(self.target_batches()), ids, steps)

    def compared(
        self, scorer: GradientScorer, directions: Any, ids: np.ndarray, steps: int | None = None
    ) -> dict[str, torch.Tensor]:
        """[n] ids -> dot [n, S] with each direction and norm2 [n]. `steps`: see `batches`."""
        assert self.targets is not None, "checked when the run was built"
        dots, norms = [], []
        for samples, _ in self.batches(ids, steps):
            dot, norm2 = scorer.score(self.targets.collate(samples), directions)
            dots.append(dot.cpu())
            norms.append(norm2.cpu())
        return {"dot": torch.cat(dots)[: len(ids)], "norm2": torch.cat(norms)[: len(ids)]}

    def batches(self, ids: np.ndarray, steps: int | None = None) -> Iterator[tuple[list[Sample], int]]:
        """(samples of a batch, how many of them count) over [n] ids; equally many batches on every rank, since sharded
        layers are called together: a rank whose share is used up repeats its first sample, and the caller drops what lies
        beyond its share. `steps`: of the rank with the most; None: of the shares."""
        if steps is None:
            steps = -(-max(self.shares()) // self.batch_size)
        for step in range(steps):
            mine = ids[step * self.batch_size : (step + 1) * self.batch_size]
            filler = ids[:1] if len(ids) else np.zeros(1, dtype=np.int64)
            yield self.pool.fetch(mine if len(mine) else filler), len(mine)
            if self.progress is not None:
                self.progress(step + 1, steps)

    def target_batches(self) -> list[list[Batch]]:
        """This rank's share of each group of targets."""
        assert self.targets is not None, "checked when the run was built"
        return target_batches(self.targets.groups, self.targets.collate, self.batch_size, self.rank, self.ranks)


def target_batches(
    groups: Sequence[Pool], collate: Callable[[Sequence[Sample]], Batch], size: int, rank: int, ranks: int
) -> list[list[Batch]]:
    """A rank's share of each group, in equally many batches on every rank; fillers have no target token."""
    return [_share_of_group(group, collate, size, rank, ranks) for group in groups]


def _share_of_group(
    group: Pool, collate: Callable[[Sequence[Sample]], Batch], size: int, rank: int, ranks: int
) -> list[Batch]:
    per_rank = -(-len(group) // ranks)
    mine = np.arange(rank * per_rank, min((rank + 1) * per_rank, len(group)))
    made = []
    for start in range(0, per_rank, size):
        here = mine[start : start + size]
        samples = group.fetch(here if len(here) else np.zeros(1, dtype=np.int64))
        if not len(here):
            samples = [replace(s, labels=np.full_like(s.labels, IGNORED)) for s in samples]
        made.append(collate(samples))
    return made


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
