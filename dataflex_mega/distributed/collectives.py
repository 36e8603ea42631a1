"""Every collective of ours, by name. Gradients, parameters and activations travel inside the engines' own wrappers.

Samples are shared out over data-parallel ranks, so tensors of samples are summed and gathered among those. Files, messages
and decisions concern every process, so plain values travel among all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.errors import TrainingFault


class Collectives:
    """With one process each of them is the identity."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    # -- among data-parallel ranks: tensors of samples -----------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over data-parallel ranks of a tensor of one shape; a new tensor on the same device."""
        total = values.to(self.mesh.device, copy=True)
        if self.mesh.dp_size > 1:
            dist.all_reduce(total, group=self.mesh.dp_group)
        return total.to(values.device)

    def sum_stages(self, values: Tensor) -> Tensor:
        """`sum` over data-parallel ranks and pipeline stages; stages that have nothing to add pass zeros."""
        if self.mesh.stages == 1:
            return self.sum(values)
        total = values.to(self.mesh.device, copy=True)
        dist.all_reduce(total, group=self.mesh.stage_group)
        return total.to(values.device)

    def extremes(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """(smallest low, largest high) over data-parallel ranks and pipeline stages, of two scalars."""
        both = torch.stack([-low, high]).to(self.mesh.device)
        if self.mesh.stages > 1 or self.mesh.dp_size > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.mesh.stage_group or self.mesh.dp_group)
        return -float(both[0]), float(both[1])

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each data-parallel rank, the same n everywhere -> [ranks * n, ...] in rank order."""
        if self.mesh.dp_size == 1:
            return rows
        mine = rows.to(self.mesh.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.mesh.dp_size)]
        dist.all_gather(parts, mine, group=self.mesh.dp_group)
        return torch.cat(parts).to(rows.device)

    def own(self, gathered: Tensor, count: int) -> Tensor:
        """[ranks * count, ...] that `gather` returned, or was computed from it -> the [count, ...] rows of this rank."""
        return gathered[self.mesh.dp_rank * count : (self.mesh.dp_rank + 1) * count]

    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor:
        """[counts[dp_rank], ...] of each data-parallel rank -> [sum(counts), ...] in rank order."""
        if self.mesh.dp_size == 1:
            return rows
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange(self, rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """[sum(counts), w] rows, the first counts[0] of them for data-parallel rank 0, and so on -> (the rows that came for
        this one, in rank order, and how many from each). With these numbers, a second call sends answers back."""
        if self.mesh.dp_size == 1:
            return rows, counts
        came = self.gather(torch.tensor(counts).unsqueeze(0))[:, self.mesh.dp_rank].tolist()
        mine = rows.to(self.mesh.device).contiguous()
        received = mine.new_empty((sum(came), *rows.shape[1:]))
        dist.all_to_all_single(received, mine, came, counts, group=self.mesh.dp_group)
        return received.to(rows.device), came

    # -- among all processes: plain values -----------------------------------------------------------------------

    def agree(self, text: str, what: str) -> None:
        """Check that all processes hold the same text. Raises TrainingFault on every one of them otherwise."""
        texts = self.gather_objects(text)
        if len(set(texts)) > 1:
            raise TrainingFault(f"ranks disagree on {what}: {texts}")

    def share_main(self, value: Any) -> Any:
        """A small Python value of rank 0, on every process."""
        if self.mesh.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python value of each process, in rank order, on every process."""
        if self.mesh.world == 1:
            return [value]
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh.world > 1:
            dist.barrier()
