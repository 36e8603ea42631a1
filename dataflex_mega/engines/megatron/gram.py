"""Inner products of mean gradients of groups of batches, in any Megatron layout.

megatron-core's own schedule, reductions and optimizer make each gradient. What a rank counts of it for the gradient norm is
what it counts here, so that no part of a weight is left out or counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataflex_mega.engines.megatron import cpu
from dataflex_mega.engines.megatron.checkpoint import bare
from dataflex_mega.signals.gram import products
from dataflex_mega.types import IGNORED, Batch

if TYPE_CHECKING:
    from dataflex_mega.engines.megatron.engine import MegatronEngine


def gradient_gram(engine: MegatronEngine, groups: list[list[Batch]]) -> Tensor:
    """m groups, this rank's batches of each -> [m, m] float64 on the CPU, equal on every rank.

    A group's gradient is that of the mean loss of its target tokens, over all ranks, in evaluation mode. Every rank must
    call it with equally many batches. m gradients are held at once, each as large as this rank's part of the optimizer's.
    """
    with cpu.redirected(), _evaluating(engine):
        gradients = [_gradient(engine, batches) for batches in groups]
        found = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=engine.mesh.device)
        for number, optimizer in enumerate(_optimizers(engine)):
            part = products([parts[number] for parts in gradients]).to(found.device)
            dist.all_reduce(part, group=optimizer.get_grad_stats_parallel_group())
            found += part
    return found.cpu()


def _gradient(engine: MegatronEngine, group: list[Batch]) -> list[list[Tensor]]:
    """For each of the optimizers (weights of experts have their own), what this rank counts of a group's gradient."""
    micros = engine.same_shape([batch.to(engine.mesh.device) for batch in group])
    if engine.layout.interleaved > 1:  # its schedule takes a multiple of the stages
        nothing = replace(micros[-1], labels=torch.full_like(micros[-1].labels, IGNORED))
        micros += [nothing] * (-len(micros) % engine.layout.pipeline)
    _zero(engine)
    engine.run(micros, _mean_loss, forward_only=False)
    engine.optimizer.prepare_grads()
    kept = [[grad.float().clone() for grad in o.get_main_grads_for_grad_norm()] for o in _optimizers(engine)]
    _zero(engine)
    return kept


def _optimizers(engine: MegatronEngine) -> list[Any]:
    return engine.optimizer.chained_optimizers


def _zero(engine: MegatronEngine) -> None:
    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()


def _mean_loss(_number: int, batch: Batch, _vectors: Any, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """For `MegatronEngine.run`, which divides the sum of the first by that of the second."""
    targets = batch.labels != IGNORED
    return torch.where(targets, losses.float(), 0.0).sum(), targets.sum().int(), {}


@contextmanager
def _evaluating(engine: MegatronEngine) -> Iterator[None]:
    """Dropout off; activations are recomputed if that is what the run does."""
    engine.mode(training=False)
    for chunk in engine.chunks:
        bare(chunk).decoder.training = True
    try:
        yield
    finally:
        engine.mode(training=True)
