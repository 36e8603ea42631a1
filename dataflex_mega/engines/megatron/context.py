"""Context parallelism: the positions of every row are split over the ranks of a group.

A row is split into two chunks per rank: rank r has chunk r and the one as far from the end, so that causal attention is
equal work for each. Keys and values of all ranks are gathered for a layer's attention (arXiv 2407.21783, 3.3.2), which
with few key-value heads is little beside the rest; everything else in a layer sees its own positions only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from dataflex_mega.types import Batch


def chunk_indices(size: int, rank: int) -> tuple[int, int]:
    """The two of the 2 * size chunks of a row that a rank has."""
    return rank, 2 * size - 1 - rank


def local_positions(length: int, size: int, rank: int) -> Tensor:
    """[length / size] int64: a rank's positions of a row, as megatron-core's rotary embeddings count them."""
    return torch.arange(length).view(2 * size, -1)[list(chunk_indices(size, rank))].flatten()


def gather_order(length: int, size: int) -> Tensor:
    """[length] int64: the index of each position of a row in the concatenated shards of all ranks."""
    return torch.cat([local_positions(length, size, rank) for rank in range(size)]).argsort()


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share rows. With one rank every method is the identity."""

    size: int = 1
    rank: int = 0
    group: Any = None

    @staticmethod
    def current() -> ContextParallel:
        """The group of megatron-core's parallel state."""
        return ContextParallel(
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_group(),
        )

    def shard(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """(the batch with this rank's positions only, [S / size] those positions); fields of samples stay whole."""
        if self.size == 1:
            return batch, None
        positions = local_positions(batch.input_ids.shape[1], self.size, self.rank).to(batch.input_ids.device)
        grids = ("input_ids", "labels", "segment_ids", "position_ids", "reference_losses")
        shards = {name: value[:, positions] for name, value in batch.tensors().items() if name in grids}
        return replace(batch, **shards), positions

    def gather(self, shard: Tensor) -> Tensor:
        """[b, S / size] of each rank -> [b, S] on all of them; gradients go to this rank's shard."""
        if self.size == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(self.size)]
        dist.all_gather(shards, shard.detach().contiguous(), group=self.group)
        shards[self.rank] = shard
        order = gather_order(shard.shape[1] * self.size, self.size)
        return torch.cat(shards, dim=1)[:, order.to(shard.device)]

    def gather_keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[S / size, b, groups, d] each -> [S, b, groups, d] in the order of positions; gradients are summed over ranks."""
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.group)
        both = both.index_select(0, gather_order(len(both), self.size).to(key.device))
        keys, values = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Causal attention of this rank's positions: [b, heads, S / size, d], keys and values of all positions
        [b, groups, S, d] -> [b, heads, S / size, d]. `options`: those of scaled_dot_product_attention."""
        length = query.shape[2] // 2
        out = []
        for chunk, queries in zip(chunk_indices(self.size, self.rank), query.split(length, dim=2), strict=True):
            visible = (chunk + 1) * length  # how many positions the last one of the chunk attends to
            mask: Any = causal_lower_right(length, visible)
            if not query.is_cuda:  # only there the bias has kernels that need no matrix
                mask = torch.ones(length, visible, dtype=torch.bool).tril(visible - length)
            keys, values = key[:, :, :visible], value[:, :, :visible]
            out.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, **options))
        return torch.cat(out, dim=2)
