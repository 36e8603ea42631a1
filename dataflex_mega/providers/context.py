"""What a provider may use of a run, and the places at which requests are served."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.pool import Sample, SamplePool
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.distributed.protocol import Collectives
from dataflex_mega.engines.base import Engine, GradientScorer
from dataflex_mega.engines.per_sample import PerSampleFn
from dataflex_mega.errors import ConfigError
from dataflex_mega.signals.pool_share import PoolShare, target_batches
from dataflex_mega.types import Batch


@dataclass(frozen=True)
class SignalContext:
    """A run, as far as signals need it. Equal on every rank but for `parallel_info`."""

    parallel_info: ParallelInfo
    collectives: Collectives
    pool: SamplePool
    evaluation: Mapping[str, SamplePool]  # evaluation sets by name
    collate: Callable[..., Batch]  # samples, pack_length=... -> a batch
    batch_size: int  # samples of a forward pass
    seed: int
    engine: Engine
    tokenizer: Any
    output_dir: Path
    cutoff_len: int
    report: Callable[[str], None]  # prints a line, once for all ranks

    def collate_unpacked(self, samples: Sequence[Sample]) -> Batch:
        """A batch of one sample per row."""
        return self.collate(samples, pack_length=None)

    def target_groups(self, boundaries: Sequence[int] | None = None) -> list[SamplePool]:
        """The evaluation sets, or what `boundaries` cut them into; see `split_targets`."""
        return split_targets(list(self.evaluation.values()), boundaries)

    def target_batches(self, groups: Sequence[SamplePool]) -> list[list[Batch]]:
        """This rank's batches of each group, one sample per row, equally many on every rank."""
        rank, size = self.parallel_info.dp_rank, self.parallel_info.dp_size
        return target_batches(groups, self.collate_unpacked, self.batch_size, rank, size)


def split_targets(sets: list[SamplePool], boundaries: Sequence[int] | None) -> list[SamplePool]:
    """Evaluation sets -> groups of targets of the sizes `boundaries`, in the order of the sets; None: the sets themselves.

    Raises ConfigError when the sizes do not sum to the number of samples.
    """
    if boundaries is None:
        return sets
    samples = sum(len(one) for one in sets)
    if sum(boundaries) != samples:
        raise ConfigError(
            f"task_boundaries: the sizes sum to {sum(boundaries)}, the evaluation sets have {samples} samples"
        )
    return SamplePool([domain for one in sets for domain in one.domains]).partition(list(boundaries))


@dataclass(frozen=True)
class CandidateScope:
    """Scope "candidates": the samples of this rank that a selector is about to score."""

    context: SignalContext
    pool_share: PoolShare
    ids: np.ndarray  # [n] global ids, ascending
    step: int  # optimizer steps done

    def batches(self) -> Iterator[tuple[list[Sample], int]]:
        """(samples of a batch, how many of them count), equally many batches on every rank; see PoolShare.batches."""
        return self.pool_share.batches()

    def per_sample(self, fn: PerSampleFn) -> Tensor:
        """A function of each candidate's logits and labels -> [n] where it returns a number, else [n, m]; on the CPU.

        See Engine.per_sample. One forward pass in evaluation mode.
        """
        engine, collate = self.context.engine, self.context.collate
        values = torch.cat([engine.per_sample(collate(samples), fn).cpu() for samples, _ in self.batches()])
        values = values[: len(self.ids)]
        return values.squeeze(1) if values.shape[1] == 1 else values

    def gradient_dots(self, scorer: GradientScorer, directions: Any) -> dict[str, Tensor]:
        """ "dot" [n, S], inner products of the candidates' gradients with each direction, and "norm2" [n], squared norms."""
        dots, norms = [], []
        for samples, _ in self.batches():
            dot, norm2 = scorer.score(self.context.collate_unpacked(samples), directions)
            dots.append(dot.cpu())
            norms.append(norm2.cpu())
        return {"dot": torch.cat(dots)[: len(self.ids)], "norm2": torch.cat(norms)[: len(self.ids)]}


@dataclass(frozen=True)
class PlanScope:
    """Scope "plan": an update after `step` steps."""

    step: int


@dataclass(frozen=True)
class BatchScope:
    """Scope "batch": before the step after `step` steps, which trains the samples `ids` [G]."""

    step: int
    ids: Callable[[], np.ndarray]
