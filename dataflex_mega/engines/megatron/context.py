"""Context parallelism: the positions of every row are shared among the ranks of a group.

A row is cut into two pieces a rank, of which rank r has number r and the one as far from the end, so that causal attention
is as much work for each. Keys and values of all ranks are gathered for a layer's attention (arXiv 2407.21783, 3.3.2), which
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
    """Which two of the 2 * size pieces of a row a rank has."""
    return rank, 2 * size - 1 - rank


def local_positions(length: int, size: int, rank: int) -> Tensor:
    """[length / size] int64: a rank's positions of a row, as megatron-core's rotary embeddings count them."""
    return torch.arange(length).view(2 * size, -1)[list(chunk_indices(size, rank))].flatten()


def gather_order(length: int, size: int) -> Tensor:
    """[length] int64: where each position of a row is when the ranks' parts lie one after the other."""
    return torch.cat([local_positions(length, size, rank) for rank in range(size)]).argsort()


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share rows. With one of them nothing changes."""

    size: int = 1
    rank: int = 0
    group: Any = None

    @staticmethod
    def current() -> ContextParallel:
        """That of megatron-core's parallel state."""
        return ContextParallel(
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_group(),
        )

    def shard(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """(the batch with this rank's positions only, [S / size] those positions); fields of samples stay whole."""
        if self.size == 1:
            return batch, None
        mine = local_positions(batch.input_ids.shape[1], self.size, self.rank).to(batch.input_ids.device)
        grids = ("input_ids", "labels", "segment_ids", "position_ids", "reference_losses")
        parts = {name: value[:, mine] for name, value in batch.tensors().items() if name in grids}
        return replace(batch, **parts), mine

    def gather(self, part: Tensor) -> Tensor:
        """[b, S / size] of each rank -> [b, S] on all of them; gradients go to this rank's part."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous(), group=self.group)
        parts[self.rank] = part
        return torch.cat(parts, dim=1)[:, gather_order(part.shape[1] * self.size, self.size).to(part.device)]

    def gather_keys_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[S / size, b, groups, d] each -> [S, b, groups, d] in the order of positions; gradients are summed over ranks."""
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.group)
        both = both.index_select(0, gather_order(len(both), self.size).to(key.device))
        whole_key, whole_value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
        return whole_key, whole_value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Causal attention of this rank's positions: [b, heads, S / size, d], keys and values of all positions
        [b, groups, S, d] -> [b, heads, S / size, d]. `options`: those of scaled_dot_product_attention."""
        length = query.shape[2] // 2
        out = []
        for piece, part in zip(chunk_indices(self.size, self.rank), query.split(length, dim=2), strict=True):
            seen = (piece + 1) * length  # the last position of the piece sees that many
            mask: Any = causal_lower_right(length, seen)
            if not query.is_cuda:  # only there the bias has kernels that need no matrix
                mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
            known = (key[:, :, :seen], value[:, :, :seen])
            out.append(F.scaled_dot_product_attention(part, *known, attn_mask=mask, **options))
        return torch.cat(out, dim=2)
