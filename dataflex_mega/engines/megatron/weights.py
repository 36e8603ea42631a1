"""Filling the chunks of a rank with weights, tensor by tensor: from a Hugging Face folder, or from names and a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ranks
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dataflex_mega.engines.hf_names import Fused, disk_shapes, fused
from dataflex_mega.engines.megatron.checkpoint import bare
from dataflex_mega.engines.megatron.convert import Cut, Recipe, global_name, is_expert, join, recipe
from dataflex_mega.engines.megatron.shape import Shape
from dataflex_mega.errors import ConfigError, DataError, did_you_mean

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(Protocol):
    """Where weights come from, by their names in a Hugging Face checkpoint."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along `dim` of a tensor, on the CPU, in the dtype that the source has."""
        ...


@dataclass(frozen=True)
class Held:
    """A parameter of this rank by its global name."""

    name: str
    parameter: nn.Parameter

    def group(self) -> Any:
        """The ranks among which the parameter is cut."""
        if is_expert(self.name):
            return ranks.get_expert_tensor_parallel_group()
        return ranks.get_tensor_model_parallel_group()

    def cut(self) -> Cut:
        """This rank's place among those."""
        group = self.group()
        return Cut(dist.get_rank(group), dist.get_world_size(group), len(self.parameter))


class HFFolder:
    """A Hugging Face folder of safetensors: one file, or several with an index. Only what is asked for is read.

    Attributes:
        shapes: every tensor of the model -> its shape.
        bytes_read: how much `read` has returned so far.
    """

    def __init__(self, folder: Path, hf_config: Any) -> None:
        """Raises DataError when the folder has no safetensors weights, or not all that the configuration asks for."""
        self.folder = folder
        self.bytes_read = 0
        self.shapes = disk_shapes(hf_config)
        self._kind = str(hf_config.model_type)
        self._open: dict[Path, Any] = {}
        self._files = self._listed()
        for name in self.shapes:
            self._place(name)

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along `dim` of the tensor `name`. Raises DataError when its shape is not the model's."""
        key, inside = self._place(name)
        stored, file = self._handle(key).get_slice(key), self._files[key]
        shape, found = self.shapes[name], tuple(stored.get_shape())
        if _shape_within(found, inside) != shape:
            raise DataError(f"{file}: {key} has shape {list(found)}; {name} of this model has shape {list(shape)}")
        window = [slice(0, length) for length in shape]
        window[dim] = slice(start, stop)
        values = stored[_index(window, inside, shape)]
        self.bytes_read += values.nbytes
        return values

    def dtypes(self) -> set[str]:
        """The dtypes of the tensors as safetensors calls them: `F32`, `BF16`, ..."""
        return {self._handle(key).get_slice(key).get_dtype() for key in {self._place(name)[0] for name in self.shapes}}

    def _listed(self) -> dict[str, Path]:
        """Every tensor in the folder -> its file."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise DataError(f"{index}: not an index of safetensors files") from error
            return {key: self.folder / file for key, file in listed.items()}
        one = self.folder / ONE_FILE
        if not one.is_file():
            raise DataError(
                f"model_name_or_path: {self.folder} has neither {ONE_FILE} nor {INDEX}; weights in another format are "
                "converted by loading and saving the model with transformers"
            )
        return dict.fromkeys(self._opened(one).keys(), one)

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{file}: cannot be read as safetensors: {error}") from error
        return self._open[file]

    def _handle(self, key: str) -> Any:
        return self._opened(self._files[key])

    def _place(self, name: str) -> tuple[str, Fused | None]:
        """The key that a tensor has in the files, and which part of that it is when experts are kept together."""
        if name in self._files:
            return name, None
        inside = fused(self._kind, name)
        if inside is not None and inside.name in self._files:
            return inside.name, inside
        unblocked = name.replace(".block_sparse_moe.", ".mlp.")  # the router, where experts are kept together
        if unblocked in self._files:
            return unblocked, None
        raise DataError(f"{self.folder}: no tensor {name}{did_you_mean(name, self._files)}, which the model has")


def _shape_within(found: tuple[int, ...], inside: Fused | None) -> tuple[int, ...]:
    """The shape of one expert's tensor in a tensor of all experts [E, rows, columns]."""
    if inside is None:
        return found
    return (found[1] // 2 if inside.half is not None else found[1], *found[2:])


def _index(window: list[slice], inside: Fused | None, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    if inside is None:
        return tuple(window)
    first = shape[0] * (inside.half or 0)
    rows = slice(first + window[0].start, first + window[0].stop)
    return (inside.expert, rows, *window[1:])


def held(chunks: Sequence[nn.Module], shape: Shape) -> Iterator[Held]:
    """Every parameter of this rank, in the same order on all ranks that share one. `chunks` may be wrapped."""
    first_expert = 0
    if shape.experts is not None:
        here = shape.experts.count // ranks.get_expert_model_parallel_world_size()
        first_expert = here * ranks.get_expert_model_parallel_rank()
    for chunk in chunks:
        model = bare(chunk)
        numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, parameter in model.named_parameters():
            yield Held(global_name(name, numbers.__getitem__, first_expert), parameter)


@torch.no_grad()
def load(chunks: Sequence[nn.Module], hf_config: Any, source: Source) -> None:
    """Fill every parameter of this rank from `source`, in place; each rank reads its slices only, no rank waits.

    Rows of the vocabulary's padding become zero. Call it before the optimizer is made, which copies the weights.
    Raises ConfigError when the model cannot be cut or converted so, DataError when the source does not fit.
    """
    shape = Shape.of(hf_config)
    for item in held(chunks, shape):
        made = recipe(shape, item.name, item.cut())
        parts = [source.read(s.name, s.dim, s.start, s.stop) for s in made.slices]
        _fill(item, made, join(parts, made.groups))


def _fill(item: Held, made: Recipe, values: Tensor) -> None:
    rows, wanted = len(values), tuple(item.parameter.shape)
    fits = rows == wanted[0] or (made.padded and rows < wanted[0])
    if not fits or tuple(values.shape[1:]) != wanted[1:]:
        raise ConfigError(
            f"engine: megatron: parameter {item.name} has shape {list(wanted)} on this rank, its weights have "
            f"{list(values.shape)}; the configuration of Megatron contradicts that of the model"
        )
    item.parameter[:rows].copy_(values)
    item.parameter[rows:].zero_()
