"""Inner products of mean gradients of groups of batches, on one process, DDP or FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import dataflex_mega.objective as objective
from dataflex_mega.engines.fsdp.parallel import set_gradient_sync
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.signals.gradient_gram import gram_matrix
from dataflex_mega.types import IGNORE_INDEX, Batch


def gradient_gram(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, groups: list[list[Batch]], loss_scale: float = 1.0
) -> Tensor:
    """m groups, this rank's batches of each -> [m, m] float64, equal on every rank.

    A group's gradient is that of the mean loss of its target tokens, over all ranks, in evaluation mode. Every rank must
    call it with equally many batches. m gradients are held at once, each as large as the trained parameters of this rank.
    """
    with runner.evaluation_mode():
        gradients = [_gradient(runner, optimizer, batches, loss_scale) for batches in groups]
    gram = gram_matrix(gradients)
    return runner.collectives.all_reduce_sum(gram) if runner.layout.mode == "fsdp2" else gram


def _gradient(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, batches: list[Batch], loss_scale: float
) -> list[Tensor]:
    """This rank's shard of a group's gradient; all of it where parameters are not sharded."""
    moved = [batch.to(runner.device) for batch in batches]
    count = runner.collectives.all_reduce_sum(
        torch.stack([(b.labels != IGNORE_INDEX).sum() for b in moved]).sum()
    ).clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(moved):
        set_gradient_sync(runner.module, last=number == len(moved) - 1)
        loss = objective.sample_sums(runner.training_losses(batch).trained, batch).sum() / count
        # The wrappers average gradients over ranks; the loss is a sum over them.
        (loss * (runner.parallel_info.dp_size * loss_scale)).backward()
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:  # a layer that no token reached
                grad = torch.zeros_like(parameter)
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            gradients.append(local.detach().float() / loss_scale)
    optimizer.zero_grad(set_to_none=True)
    return gradients
