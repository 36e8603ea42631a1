"""Inner products of mean gradients of groups of batches, on one process, DDP or FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dataflex_mega import objective
from dataflex_mega.engines.fsdp.parallel import set_gradient_sync
from dataflex_mega.signals.gram import products
from dataflex_mega.types import IGNORED, Batch

if TYPE_CHECKING:
    from dataflex_mega.engines.fsdp.engine import FSDPEngine


def gradient_gram(engine: FSDPEngine, groups: list[list[Batch]]) -> Tensor:
    """m groups, this rank's batches of each -> [m, m] float64, equal on every rank.

    A group's gradient is that of the mean loss of its target tokens, over all ranks, in evaluation mode. Every rank must
    call it with equally many batches. m gradients are held at once, each as large as the trained parameters of this rank.
    """
    engine.module.eval()
    gradients = [_gradient(engine, batches) for batches in groups]
    engine.module.train()
    found = products(gradients)
    return engine.collectives.sum(found) if engine.layout.mode == "fsdp2" else found


def _gradient(engine: FSDPEngine, batches: list[Batch]) -> list[Tensor]:
    """This rank's part of a group's gradient; the whole of it where parameters are not sharded."""
    moved = [batch.to(engine.mesh.device) for batch in batches]
    count = engine.collectives.sum(torch.stack([(b.labels != IGNORED).sum() for b in moved]).sum()).clamp(min=1)
    engine.optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(moved):
        set_gradient_sync(engine.module, last=number == len(moved) - 1)
        loss = objective.sample_sums(engine.token_losses(batch), batch).sum() / count
        # The wrappers average gradients over ranks; the loss is a sum over them.
        (loss * (engine.mesh.dp_size * engine.scale.value)).backward()
    found = []
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:  # a layer that no token reached
                grad = torch.zeros_like(parameter)
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            found.append(local.detach().float() / engine.scale.value)
    engine.optimizer.zero_grad(set_to_none=True)
    return found
