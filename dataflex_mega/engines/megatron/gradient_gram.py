"""Inner products of mean gradients of groups of batches, in any Megatron layout.

megatron-core's own schedule, reductions and optimizer make each gradient. What a rank counts of it for the gradient norm is
what it counts here, so that no shard of a weight is left out or counted twice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataflex_mega.engines.megatron import cpu
from dataflex_mega.engines.megatron.runner import MegatronModelRunner, ScheduleLoss
from dataflex_mega.losses.base import TokenLosses
from dataflex_mega.signals.gradient_gram import gram_matrix
from dataflex_mega.types import IGNORE_INDEX, Batch


def gradient_gram(runner: MegatronModelRunner, optimizer: Any, groups: list[list[Batch]]) -> Tensor:
    """m groups, this rank's batches of each -> [m, m] float64 on the CPU, equal on every rank.

    A group's gradient is that of the mean loss of its target tokens, over all ranks, in evaluation mode. Every rank must
    call it with equally many batches. m gradients are held at once, each as large as this rank's shard in the optimizer.
    """
    with cpu.cuda_calls_on_cpu(), runner.evaluation_mode(recompute=True):
        gradients = [_gradient(runner, optimizer, batches) for batches in groups]
        gram = torch.zeros(len(groups), len(groups), dtype=torch.float64, device=runner.device)
        for number, part in enumerate(optimizer.chained_optimizers):
            local = gram_matrix([gradient[number] for gradient in gradients]).to(gram.device)
            dist.all_reduce(local, group=part.get_grad_stats_parallel_group())
            gram += local
    return gram.cpu()


def _gradient(runner: MegatronModelRunner, optimizer: Any, group: list[Batch]) -> list[list[Tensor]]:
    """For each of the chained optimizers (experts have their own), what this rank counts of a group's gradient."""
    micro_batches = runner.equalize_shapes([batch.to(runner.device) for batch in group])
    if runner.layout.interleaved > 1:  # its schedule takes a multiple of the stages
        nothing = replace(micro_batches[-1], labels=torch.full_like(micro_batches[-1].labels, IGNORE_INDEX))
        micro_batches += [nothing] * (-len(micro_batches) % runner.layout.pipeline)
    runner.zero_grad(optimizer)
    runner.forward_backward(micro_batches, _mean_loss, forward_only=False)
    optimizer.prepare_grads()
    gradients = [
        [grad.float().clone() for grad in part.get_main_grads_for_grad_norm()] for part in optimizer.chained_optimizers
    ]
    runner.zero_grad(optimizer)
    return gradients


def _mean_loss(_number: int, batch: Batch, _embeddings: Tensor | None, losses: TokenLosses) -> ScheduleLoss:
    """For `forward_backward`, which divides the sum of the first by that of the second."""
    targets = batch.labels != IGNORE_INDEX
    return losses.trained.sum(), targets.sum().int(), {}
