"""Quantities over a vocabulary that tensor-parallel ranks share, as losses.base.Vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class ShardedVocabulary:
    """This rank's shard. Each rank differentiates the same loss, and a gradient stays in the shard that it belongs to.

    Attributes:
        size: tokens of the whole vocabulary, without its padding.
        first: the token of this shard's first logit.
    """

    size: int
    first: int

    def mean(self, logits: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(self._real(logits).sum(dim=-1)) / self.size

    def at(self, logits: Tensor, labels: Tensor) -> Tensor:
        index = labels - self.first
        is_here = (index >= 0) & (index < logits.shape[-1])
        found = logits.gather(-1, index.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        return reduce_from_tensor_model_parallel_region(torch.where(is_here, found, 0.0))

    def largest(self, logits: Tensor, count: int) -> Tensor:
        logits = logits.detach()
        local = logits.topk(min(count, logits.shape[-1]), dim=-1).values.contiguous()  # padding is far below all others
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        if ranks > 1:
            shards = [torch.empty_like(local) for _ in range(ranks)]
            dist.all_gather(shards, local, group=parallel_state.get_tensor_model_parallel_group())
            local = torch.cat(shards, dim=-1)
        return local.topk(min(count, self.size), dim=-1).values

    def _real(self, logits: Tensor) -> Tensor:
        return logits[..., : min(max(self.size - self.first, 0), logits.shape[-1])]
