"""Signals of candidates, computed where the candidates are: each rank has a contiguous share of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from dataflex_mega.data.lockstep import FIRST_ID, lockstep_batches, lockstep_shares
from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.types import IGNORE_INDEX, Batch, SampleStats, SignalTable

GRADIENT_SIGNALS = {"gradient_adam": True, "gradient_sgd": False}  # signal -> whether Adam's moments precondition
BUILT_IN_SIGNALS = frozenset({"loss", "reference_loss", *GRADIENT_SIGNALS})


class GradientScorer(Protocol):
    """What the engines' gradient scorers have in common; see engines.fsdp.gradient_scorer."""

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Any: ...
    def score(self, batch: Batch, directions: Any) -> tuple[torch.Tensor, torch.Tensor]: ...


class Provider(Protocol):
    """Computes signals beyond the built-in ones; providers.registry says which."""

    def __call__(self, computer: SignalComputer, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """[n] global ids of this rank's candidates -> signals by name, n rows each, on the CPU.

        Called on every rank at the same time, also on one without candidates. A provider that runs the model does so over
        `computer.batches(ids)`, which yields equally many batches on every rank.
        """
        ...


@dataclass(frozen=True)
class TargetSets:
    """What gradient scores compare candidates with: one group of samples per sub-task."""

    groups: Sequence[SamplePool]
    gradient_scorer: Callable[[bool], GradientScorer]  # whether to use Adam -> a scorer of the current model
    collate: Callable[[Sequence[Sample]], Batch]  # one sample per row


@dataclass
class SignalComputer:
    """Computes signals in batches that do not depend on the number of ranks."""

    pool: SamplePool
    collate: Callable[[Sequence[Sample]], Batch]
    loss_fn: Callable[[Batch], SampleStats]  # Engine.sample_losses
    batch_size: int
    dp_rank: int
    dp_size: int
    progress: Callable[[int, int], None] | None = None  # (batches done, batches in all)
    targets: TargetSets | None = None
    providers: Mapping[str, Provider] = field(default_factory=dict)  # by what a selector's `needs` calls the signal
    step: int = 0  # optimizer steps done, set before every table

    candidate_ids: np.ndarray | None = field(default=None, init=False)  # sorted ids, or None for the whole pool

    def subset(self, ids: torch.Tensor) -> SignalComputer:
        """A computer of these candidates alone, [n] ids in ascending order."""
        other = replace(self)
        other.restrict_to(ids.numpy())
        return other

    def domain_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """[n] global ids -> [n] int64 domains."""
        return torch.from_numpy(self.pool.locate(ids.numpy())[0].astype(np.int64))

    def restrict_to(self, ids: np.ndarray) -> None:
        """Take these samples of the pool, sorted ids, as the candidates from now on."""
        self.candidate_ids = ids

    def rank_counts(self) -> list[int]:
        """Candidates of each rank: whole batches, the remainder to the first ranks."""
        total = len(self.pool) if self.candidate_ids is None else len(self.candidate_ids)
        batches = -(-total // self.batch_size)
        ends = [batches * (r + 1) // self.dp_size * self.batch_size for r in range(self.dp_size)]
        ends[-1] = total
        ends = [min(end, total) for end in ends]
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def first_position(self) -> int:
        """Where this rank's share begins among all candidates."""
        return sum(self.rank_counts()[: self.dp_rank])

    def local_ids(self) -> np.ndarray:
        """[n] global ids of this rank's candidates, ascending."""
        first = self.first_position()
        positions = np.arange(first, first + self.rank_counts()[self.dp_rank], dtype=np.int64)
        return positions if self.candidate_ids is None else self.candidate_ids[positions]

    def num_batches(self) -> int:
        """Batches of the rank that has the most candidates."""
        return -(-max(self.rank_counts()) // self.batch_size)

    def table(self, needs: frozenset[str]) -> SignalTable:
        """This rank's candidates with the requested signals. Every rank must call it."""
        ids = self.local_ids()
        signals: dict[str, torch.Tensor] = {}
        if "loss" in needs:
            signals["loss"] = self._losses(ids)
        if "reference_loss" in needs:
            signals["reference_loss"] = self._reference_losses(ids)
        for name in sorted(needs & set(GRADIENT_SIGNALS)):
            signals.update(self._gradients(ids, GRADIENT_SIGNALS[name]))
        for name in sorted(needs & set(self.providers)):
            signals.update(self.providers[name](self, ids))
        return SignalTable(torch.from_numpy(ids), self.domain_ids(torch.from_numpy(ids)), signals)

    def _losses(self, ids: np.ndarray) -> torch.Tensor:
        """[n] ids -> [n] float32 mean losses."""
        losses = [self.loss_fn(self.collate(samples)).loss.float().cpu() for samples, _ in self.batches(ids)]
        return torch.cat(losses)[: len(ids)]

    def _reference_losses(self, ids: np.ndarray) -> torch.Tensor:
        """[n] ids -> [n] float32 mean losses of the reference model, 0 for a sample without targets; no forward pass."""
        losses = np.zeros(len(ids), dtype=np.float32)
        for start in range(0, len(ids), self.batch_size):
            for row, sample in enumerate(self.pool.fetch(ids[start : start + self.batch_size]), start):
                assert sample.reference_losses is not None, "attached to the pool when the run was built"
                targets = sample.labels[1:] != IGNORE_INDEX
                if targets.any():
                    losses[row] = sample.reference_losses[:-1][targets].mean(dtype=np.float64)
        return torch.from_numpy(losses)

    def _gradients(self, ids: np.ndarray, adam: bool) -> dict[str, torch.Tensor]:
        """[n] ids -> dot [n, S] with each group's direction and norm2 [n]."""
        assert self.targets is not None, "checked when the run was built"
        scorer = self.targets.gradient_scorer(adam)
        return self.gradient_dots(scorer, scorer.directions(self.target_batches()), ids)

    def gradient_dots(self, scorer: GradientScorer, directions: Any, ids: np.ndarray) -> dict[str, torch.Tensor]:
        """[n] ids -> "dot" [n, S], inner products with each direction, and "norm2" [n], squared norms."""
        assert self.targets is not None, "checked when the run was built"
        dots, norms = [], []
        for samples, _ in self.batches(ids):
            dot, norm2 = scorer.score(self.targets.collate(samples), directions)
            dots.append(dot.cpu())
            norms.append(norm2.cpu())
        return {"dot": torch.cat(dots)[: len(ids)], "norm2": torch.cat(norms)[: len(ids)]}

    def batches(self, ids: np.ndarray) -> Iterator[tuple[list[Sample], int]]:
        """[n] ids of this rank's candidates -> pairs (samples of a batch, how many of them count); equally many pairs on
        every rank, see data.lockstep. The caller drops results beyond its n."""
        total = self.num_batches()
        for number, (batch_ids, count) in enumerate(lockstep_batches(ids, self.batch_size, total), 1):
            yield self.pool.fetch(batch_ids), count
            if self.progress is not None:
                self.progress(number, total)

    def target_batches(self) -> list[list[Batch]]:
        """This rank's share of each group of targets."""
        assert self.targets is not None, "checked when the run was built"
        return target_batches(self.targets.groups, self.targets.collate, self.batch_size, self.dp_rank, self.dp_size)


def target_batches(
    groups: Sequence[SamplePool], collate: Callable[[Sequence[Sample]], Batch], size: int, dp_rank: int, dp_size: int
) -> list[list[Batch]]:
    """A rank's share of each group, in equally many batches on every rank; fillers have no target token."""
    return [lockstep_shares(group, np.arange(len(group)), collate, size, dp_rank, dp_size) for group in groups]


def evaluate(computer: SignalComputer) -> tuple[torch.Tensor, torch.Tensor]:
    """([k] float64 loss sums, [k] float64 target tokens) of this rank's share of the computer's pool, by domain."""
    loss_sum, num_tokens = (torch.zeros(len(computer.pool.sizes), dtype=torch.float64) for _ in range(2))
    batches = lockstep_batches(computer.local_ids(), computer.batch_size, computer.num_batches(), filler=FIRST_ID)
    for batch_ids, count in batches:
        samples = computer.loss_fn(computer.collate(computer.pool.fetch(batch_ids)))
        if count:
            loss_sum.index_add_(0, samples.domain_ids.cpu(), samples.loss_sum.double().cpu())
            num_tokens.index_add_(0, samples.domain_ids.cpu(), samples.num_tokens.double().cpu())
    return loss_sum, num_tokens
