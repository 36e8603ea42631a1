"""All collectives of this package but those inside the engines' wrappers (gradients, parameters, activations).

Samples are divided over data-parallel ranks, so tensors of samples are summed and gathered among those. Files, messages
and decisions concern every process, so Python values are exchanged among all processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.errors import TrainingFault


class TorchCollectives:
    """With one process every method returns its argument unchanged, or a copy of it."""

    def __init__(self, parallel_info: ParallelInfo) -> None:
        self.parallel_info = parallel_info

    # -- among data-parallel ranks: tensors of samples -----------------------------------------------------------

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over data-parallel ranks of a tensor of one shape; a new tensor on the same device."""
        total = values.to(self.parallel_info.device, copy=True)
        if self.parallel_info.dp_size > 1:
            dist.all_reduce(total, group=self.parallel_info.dp_group)
        return total.to(values.device)

    def all_reduce_sum_with_pipeline(self, values: Tensor) -> Tensor:
        """`all_reduce_sum` over data-parallel ranks and pipeline stages; a stage with nothing to add passes zeros."""
        if self.parallel_info.pipeline_stages == 1:
            return self.all_reduce_sum(values)
        total = values.to(self.parallel_info.device, copy=True)
        dist.all_reduce(total, group=self.parallel_info.dp_pp_group)
        return total.to(values.device)

    def sum_over_model_ranks(self, value: int) -> int:
        """The sum of a number over all processes, where tensor- or context-parallel ranks share samples; what
        `all_reduce_sum_with_pipeline` has summed is complete without them."""
        info = self.parallel_info
        if info.dp_size * info.pipeline_stages == info.world_size:
            return value
        total = torch.tensor(float(value), device=info.device)
        dist.all_reduce(total)
        return int(total)

    def all_reduce_min_max(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """(smallest low, largest high) over data-parallel ranks and pipeline stages, of two scalars."""
        both = torch.stack([-low, high]).to(self.parallel_info.device)
        if self.parallel_info.pipeline_stages > 1 or self.parallel_info.dp_size > 1:
            dist.all_reduce(
                both, op=dist.ReduceOp.MAX, group=self.parallel_info.dp_pp_group or self.parallel_info.dp_group
            )
        return -float(both[0]), float(both[1])

    def all_gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each data-parallel rank, the same n everywhere -> [dp_size * n, ...] in rank order."""
        if self.parallel_info.dp_size == 1:
            return rows
        local = rows.to(self.parallel_info.device).contiguous()
        gathered = [torch.empty_like(local) for _ in range(self.parallel_info.dp_size)]
        dist.all_gather(gathered, local, group=self.parallel_info.dp_group)
        return torch.cat(gathered).to(rows.device)

    def local_rows(self, gathered: Tensor, count: int) -> Tensor:
        """[dp_size * count, ...] in the order of `all_gather` -> the [count, ...] rows of this rank."""
        return gathered[self.parallel_info.dp_rank * count : (self.parallel_info.dp_rank + 1) * count]

    def all_gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor:
        """[counts[dp_rank], ...] of each data-parallel rank -> [sum(counts), ...] in rank order."""
        if self.parallel_info.dp_size == 1:
            return rows
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        by_rank = self.all_gather(padded).split(max(counts))
        return torch.cat([rank_rows[:count] for rank_rows, count in zip(by_rank, counts, strict=True)])

    def all_to_all(self, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """[sum(counts), w] rows, the first counts[0] of them for data-parallel rank 0, and so on -> (the rows for this rank,
        in rank order; how many came from each). Called again with these counts, it sends answers back."""
        if self.parallel_info.dp_size == 1:
            return rows, counts
        received_counts = self.all_gather(torch.tensor(counts).unsqueeze(0))[:, self.parallel_info.dp_rank].tolist()
        local = rows.to(self.parallel_info.device).contiguous()
        received = local.new_empty((sum(received_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, local, received_counts, counts, group=self.parallel_info.dp_group)
        return received.to(rows.device), received_counts

    # -- among all processes: Python values -----------------------------------------------------------------------

    def assert_same(self, text: str, what: str) -> None:
        """Check that all processes hold the same text. Raises TrainingFault on every one of them otherwise."""
        texts = self.all_gather_objects(text)
        if len(set(texts)) > 1:
            raise TrainingFault(f"ranks disagree on {what}: {texts}")

    def broadcast_object(self, value: Any) -> Any:
        """A small picklable value of rank 0, on every process."""
        if self.parallel_info.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of each process, in rank order, on every process."""
        if self.parallel_info.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.parallel_info.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.parallel_info.world_size > 1:
            dist.barrier()
