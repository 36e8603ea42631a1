"""Every collective of ours, by name. Gradients and parameters travel inside the engines' own wrappers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.errors import TrainingFault


class Collectives:
    """Data-parallel collectives. With one process each of them is the identity."""

    def __init__(self, mesh: Mesh, group: dist.ProcessGroup | None = None) -> None:
        self.mesh, self.group = mesh, group

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks of a tensor of one shape; a new tensor on the same device."""
        total = values.to(self.mesh.device, copy=True)
        if self.mesh.dp_size > 1:
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def gather(self, rows: Tensor) -> Tensor:
        """[n, ...] of each rank, the same n everywhere -> [ranks * n, ...] in rank order."""
        if self.mesh.dp_size == 1:
            return rows
        mine = rows.to(self.mesh.device).contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.mesh.dp_size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts).to(rows.device)

    def own(self, gathered: Tensor, count: int) -> Tensor:
        """[ranks * count, ...] that `gather` returned, or was computed from it -> the [count, ...] rows of this rank."""
        return gathered[self.mesh.dp_rank * count : (self.mesh.dp_rank + 1) * count]

    def gather_uneven(self, rows: Tensor, counts: list[int]) -> Tensor:
        """[counts[rank], ...] of each rank -> [sum(counts), ...] in rank order."""
        if self.mesh.dp_size == 1:
            return rows
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.gather(padded).split(max(counts))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def agree(self, text: str, what: str) -> None:
        """Check that all ranks hold the same text. Raises TrainingFault on every rank otherwise."""
        if self.mesh.dp_size == 1:
            return
        texts: list[Any] = [None] * self.mesh.dp_size
        dist.all_gather_object(texts, text, group=self.group)
        if len(set(texts)) > 1:
            raise TrainingFault(f"ranks disagree on {what}: {texts}")

    def share_main(self, value: Any) -> Any:
        """A small Python value of rank 0, on every rank."""
        if self.mesh.dp_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python value of each rank, in rank order, on every rank."""
        if self.mesh.dp_size == 1:
            return [value]
        values: list[Any] = [None] * self.mesh.dp_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.mesh.dp_size > 1:
            dist.barrier(group=self.group)
