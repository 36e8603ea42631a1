"""Writing the chunks of all ranks as a Hugging Face folder, parameter by parameter.

In every tensor-parallel group one rank gathers the parts of one parameter after the other and writes files of its own, so
pipeline stages and expert-parallel ranks write at the same time and no rank ever holds more than one file's tensors. All
writers need to see the same folder.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ranks
from safetensors.torch import save_file
from torch import Tensor, nn

from dataflex_mega.engines.hf_names import disk_shapes, meta_model
from dataflex_mega.engines.megatron.convert import Cut, Slice, is_expert, recipe, split
from dataflex_mega.engines.megatron.shape import Shape
from dataflex_mega.engines.megatron.weights import INDEX, ONE_FILE, Held, held

FILE_BYTES = 5 * 10**9
PART = ".part"  # what a file is called until all ranks have written theirs


@dataclass(frozen=True)
class ExportOptions:
    """What is not the model's.

    Attributes:
        file_bytes: a file is closed before it grows beyond that; one tensor alone may.
        generation: transformers.GenerationConfig to write; None: what the configuration implies.
    """

    file_bytes: int = FILE_BYTES
    generation: Any = None


def export(
    chunks: Sequence[nn.Module],
    hf_config: Any,
    folder: Path,
    dtype: torch.dtype,
    options: ExportOptions | None = None,
) -> None:
    """Write the model as `save_pretrained` would, with weights in `dtype`; every rank calls it, and returns when all is
    there. Files get their names when all of them are written: a run killed before leaves an older export as it was.
    """
    options = options or ExportOptions()
    shape, sizes = Shape.of(hf_config), disk_shapes(hf_config)
    share = [item for item in held(chunks, shape) if _takes_part(item) and not _is_copy(item, shape)]
    mine = [s.name for item in share if item.cut().rank == 0 for s in _slices(shape, item)]
    batches = pack(mine, [math.prod(sizes[name]) * dtype.itemsize for name in mine], options.file_bytes)
    plan = _gathered(batches)
    names = file_names([len(theirs) for theirs in plan])
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(folder, list(zip(names[dist.get_rank()], batches, strict=True)))
    for item in share:
        for name, tensor in _whole(shape, item, sizes, dtype):
            writer.add(name, tensor)
    files = {
        name: file
        for r, theirs in enumerate(plan)
        for file, part in zip(names[r], theirs, strict=True)
        for name in part
    }
    _publish(folder, files, names[dist.get_rank()])
    if dist.get_rank() == 0:
        total = sum(math.prod(sizes[name]) * dtype.itemsize for name in files)
        _write_index(folder, files, total)
        _write_configs(folder, hf_config, dtype, options.generation)
    dist.barrier()


def pack(names: Sequence[str], sizes: Sequence[int], limit: int) -> list[list[str]]:
    """Names in order, cut into runs whose sizes in bytes add up to at most `limit`; a larger one is alone."""
    batches: list[list[str]] = []
    room = 0
    for name, size in zip(names, sizes, strict=True):
        if size > room or not batches:
            batches.append([])
            room = limit
        batches[-1].append(name)
        room -= size
    return batches


def file_names(counts: Sequence[int]) -> list[list[str]]:
    """How many files each rank writes -> their names, numbered through, as transformers names them."""
    total = sum(counts)
    if total == 1:
        return [[ONE_FILE] * count for count in counts]
    numbers = iter(range(1, total + 1))
    return [[f"model-{next(numbers):05d}-of-{total:05d}.safetensors" for _ in range(count)] for count in counts]


class _Writer:
    """Collects tensors in the planned order and writes a file when it has all of the file's."""

    def __init__(self, folder: Path, files: list[tuple[str, list[str]]]) -> None:
        self.folder = folder
        self.files = iter(files)
        self.pending: dict[str, Tensor] = {}
        self.file, self.wanted = next(self.files, ("", []))

    def add(self, name: str, tensor: Tensor) -> None:
        if name != self.wanted[len(self.pending)]:
            raise RuntimeError(f"export: {name} came where {self.wanted[len(self.pending)]} was planned")
        self.pending[name] = tensor
        if len(self.pending) == len(self.wanted):
            save_file(self.pending, self.folder / (self.file + PART), metadata={"format": "pt"})
            self.pending = {}
            self.file, self.wanted = next(self.files, ("", []))


def _takes_part(item: Held) -> bool:
    """Whether this rank's copy is the one that is written: data-parallel ranks hold equal ones."""
    if is_expert(item.name):
        return ranks.get_expert_data_parallel_rank() == 0
    return ranks.get_data_parallel_rank(with_context_parallel=True) == 0


def _is_copy(item: Held, shape: Shape) -> bool:
    """Whether another stage writes it: the last one has a copy of tied embeddings."""
    return shape.tied and item.name == "output_layer.weight"


def _slices(shape: Shape, item: Held) -> tuple[Slice, ...]:
    return recipe(shape, item.name, item.cut()).slices


def _gathered(batches: list[list[str]]) -> list[list[list[str]]]:
    """What every rank writes, on every rank."""
    plan: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plan, batches)
    return plan


@torch.no_grad()
def _whole(
    shape: Shape, item: Held, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Name and all of each Hugging Face tensor that a parameter holds, on the rank that writes; nothing on the others.

    Every rank of the parameter's tensor-parallel group iterates.
    """
    cut = item.cut()
    part = item.parameter.detach().to(dtype).contiguous()
    if not recipe(shape, item.name, cut).sharded:
        parts = [part] if cut.rank == 0 else []
    else:
        parts = _gather_parts(part, item)
    if not parts:
        return
    slices = _slices(shape, item)
    made = {s.name: torch.empty(sizes[s.name], dtype=dtype) for s in slices}
    for rank, values in enumerate(parts):
        theirs = recipe(shape, item.name, Cut(rank, cut.size, cut.rows))
        lengths = [s.stop - s.start for s in theirs.slices]
        # A slice along columns is all rows of the parameter; the vocabulary's padding is left out.
        rows = [len(values)] if theirs.slices[0].dim else lengths
        for s, block in zip(theirs.slices, split(values[: sum(rows)], rows, theirs.groups), strict=True):
            made[s.name].narrow(s.dim, s.start, s.stop - s.start).copy_(block)
    yield from made.items()


def _gather_parts(part: Tensor, item: Held) -> list[Tensor]:
    """The parts of all ranks that share a parameter, in order, on the first of them; nothing on the others."""
    cut = item.cut()
    if cut.size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(cut.size)] if cut.rank == 0 else None
    dist.gather(part, parts, group=item.group(), group_dst=0)
    return parts or []


def _publish(folder: Path, files: dict[str, str], mine: list[str]) -> None:
    """Give the files their names once all are written, after the weights of an older export are gone."""
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / INDEX).unlink(missing_ok=True)
        for old in {folder / ONE_FILE, *folder.glob("model-?????-of-?????.safetensors")}:
            old.unlink(missing_ok=True)
    dist.barrier()
    for name in mine:
        (folder / (name + PART)).replace(folder / name)
    dist.barrier()


def _write_index(folder: Path, files: dict[str, str], total: int) -> None:
    if set(files.values()) == {ONE_FILE}:
        return
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    part = folder / (INDEX + PART)
    part.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / INDEX)


def _write_configs(folder: Path, hf_config: Any, dtype: torch.dtype, generation: Any) -> None:
    model = meta_model(hf_config)
    config = copy.deepcopy(hf_config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    (model.generation_config if generation is None else generation).save_pretrained(folder)
