"""Write the chunks of all ranks as a Hugging Face folder, parameter by parameter.

In every tensor-parallel group one rank gathers the shards of one parameter after the other and writes files of its own, so
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
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor, nn

from dataflex_mega.engines.hf_names import checkpoint_shapes, meta_model
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.hf_mapping import (
    ShardPosition,
    TensorSlice,
    is_expert,
    mapping_recipe,
    split_groups,
)
from dataflex_mega.engines.megatron.weights import INDEX, ONE_FILE, LocalParameter, local_parameters
from dataflex_mega.files import (
    atomic_write,
    hide_model,
    published_model,
    remove_other_weights,
    replace_file,
    system_errors,
)

FILE_BYTES = 5 * 10**9
PART = ".part"  # suffix of a file until all ranks have written theirs


@dataclass(frozen=True)
class ExportOptions:
    """Options that do not follow from the model.

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
    decoder, shapes = DecoderConfig.from_hf_config(hf_config), checkpoint_shapes(hf_config)
    parameters = [
        item for item in local_parameters(chunks, decoder) if _is_first_replica(item) and not _is_copy(item, decoder)
    ]
    names_of_rank = [s.name for item in parameters if item.position().rank == 0 for s in _slices(decoder, item)]
    batches = pack(
        names_of_rank, [math.prod(shapes[name]) * dtype.itemsize for name in names_of_rank], options.file_bytes
    )
    plan = _gather_plan(batches)
    names = file_names([len(files) for files in plan])
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"model*.safetensors{PART}"):
            leftover.unlink()
    dist.barrier()
    writer = _Writer(folder, list(zip(names[dist.get_rank()], batches, strict=True)))
    for item in parameters:
        for name, tensor in _full_tensors(decoder, item, shapes, dtype):
            writer.add(name, tensor)
    _raise_everywhere(writer.error)
    files = {
        name: file
        for rank, batches_of_rank in enumerate(plan)
        for file, batch in zip(names[rank], batches_of_rank, strict=True)
        for name in batch
    }
    _publish(folder, files, names[dist.get_rank()])
    if dist.get_rank() == 0:
        total = sum(math.prod(shapes[name]) * dtype.itemsize for name in files)
        _write_index(folder, files, total)
        _write_configs(folder, hf_config, dtype, options.generation)
    dist.barrier()


def pack(names: Sequence[str], sizes: Sequence[int], limit: int) -> list[list[str]]:
    """Names in order, split into runs whose sizes in bytes add up to at most `limit`; a larger one is alone."""
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
        self.error: OSError | None = None  # the first; it is raised when the ranks have gathered all tensors
        self.file, self.planned_names = next(self.files, ("", []))

    def add(self, name: str, tensor: Tensor) -> None:
        if name != self.planned_names[len(self.pending)]:
            raise RuntimeError(f"export: {name} came where {self.planned_names[len(self.pending)]} was planned")
        self.pending[name] = tensor
        if len(self.pending) == len(self.planned_names):
            self._write(self.folder / (self.file + PART))
            self.pending = {}
            self.file, self.planned_names = next(self.files, ("", []))

    def _write(self, path: Path) -> None:
        try:
            with system_errors(path):
                save_file(self.pending, path, metadata={"format": "pt"})
        except OSError as error:
            self.error = self.error or error


def _raise_everywhere(error: OSError | None) -> None:
    """Raise on every rank what the first one that could not write has met."""
    plain = None if error is None else (error.errno, error.strerror, str(error.filename))
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, plain)
    for found in errors:
        if found is not None:
            raise OSError(*found) from error


def _is_first_replica(item: LocalParameter) -> bool:
    """Whether this rank's copy is the one that is written: data-parallel ranks hold equal ones."""
    if is_expert(item.name):
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def _is_copy(item: LocalParameter, decoder: DecoderConfig) -> bool:
    """Whether another stage writes it: the last one has a copy of tied embeddings."""
    return decoder.tie_embeddings and item.name == "output_layer.weight"


def _slices(decoder: DecoderConfig, item: LocalParameter) -> tuple[TensorSlice, ...]:
    return mapping_recipe(decoder, item.name, item.position()).slices


def _gather_plan(batches: list[list[str]]) -> list[list[list[str]]]:
    """What every rank writes, on every rank."""
    plan: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plan, batches)
    return plan


@torch.no_grad()
def _full_tensors(
    decoder: DecoderConfig, item: LocalParameter, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of each Hugging Face tensor in a parameter, on the rank that writes; nothing on the others.

    Every rank of the parameter's tensor-parallel group iterates.
    """
    position = item.position()
    shard = item.parameter.detach().to(dtype).contiguous()
    if not mapping_recipe(decoder, item.name, position).sharded:
        shards = [shard] if position.rank == 0 else []
    else:
        shards = _gather_shards(shard, item)
    if not shards:
        return
    slices = _slices(decoder, item)
    tensors = {s.name: torch.empty(shapes[s.name], dtype=dtype) for s in slices}
    for rank, values in enumerate(shards):
        recipe = mapping_recipe(decoder, item.name, ShardPosition(rank, position.size, position.rows))
        lengths = [s.stop - s.start for s in recipe.slices]
        # A slice along columns is all rows of the parameter; the vocabulary's padding is left out.
        rows = [len(values)] if recipe.slices[0].dim else lengths
        for s, block in zip(recipe.slices, split_groups(values[: sum(rows)], rows, recipe.groups), strict=True):
            tensors[s.name].narrow(s.dim, s.start, s.stop - s.start).copy_(block)
    yield from tensors.items()


def _gather_shards(shard: Tensor, item: LocalParameter) -> list[Tensor]:
    """The shards of all ranks that share a parameter, in order, on the first of them; nothing on the others."""
    position = item.position()
    if position.size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(position.size)] if position.rank == 0 else None
    dist.gather(shard, shards, group=item.group(), group_dst=0)
    return shards or []


def _publish(folder: Path, files: dict[str, str], names_of_rank: list[str]) -> None:
    """Give the files their names once all are written; then the weights of an older export go. See files.published_model."""
    dist.barrier()
    if dist.get_rank() == 0:
        hide_model(folder, set(files.values()))
    dist.barrier()
    for name in names_of_rank:
        replace_file(folder / (name + PART), folder / name)
    dist.barrier()
    if dist.get_rank() == 0:
        remove_other_weights(folder, set(files.values()))
    dist.barrier()


def _write_index(folder: Path, files: dict[str, str], total: int) -> None:
    if set(files.values()) == {ONE_FILE}:
        return
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    atomic_write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_configs(folder: Path, hf_config: Any, dtype: torch.dtype, generation: Any) -> None:
    model = meta_model(hf_config)
    config = copy.deepcopy(hf_config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    with published_model(folder) as temporary:
        config.save_pretrained(temporary)
        (model.generation_config if generation is None else generation).save_pretrained(temporary)
