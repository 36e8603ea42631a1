"""Fill the chunks of a rank with weights, tensor by tensor: from a Hugging Face folder, or from names and a seed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dataflex_mega.engines.hf_names import FusedExpert, checkpoint_shapes, locate_fused_expert
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.hf_mapping import (
    MappingRecipe,
    ShardPosition,
    global_name,
    is_expert,
    join_groups,
    mapping_recipe,
)
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.errors import ConfigError, DataError, did_you_mean

OF_A_LAYER = re.compile(r"model\.layers\.\d+\.")
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightSource(Protocol):
    """Where weights come from, by their names in a Hugging Face checkpoint."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along `dim` of a tensor, on the CPU, in the dtype that the source has."""
        ...


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank by its global name."""

    name: str
    parameter: nn.Parameter

    def group(self) -> Any:
        """The ranks that hold shards of the parameter."""
        if is_expert(self.name):
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    def position(self) -> ShardPosition:
        """The shard of this rank among those of the group."""
        group = self.group()
        return ShardPosition(dist.get_rank(group), dist.get_world_size(group), len(self.parameter))


class HFCheckpointReader:
    """A Hugging Face folder of safetensors: one file, or several with an index. Only the slices asked for are read.

    Attributes:
        shapes: every tensor of the model -> its shape.
        bytes_read: how much `read` has returned so far.
    """

    def __init__(self, folder: Path, hf_config: Any) -> None:
        """Raises DataError when the folder has no safetensors weights, not all that the configuration asks for, or those
        of other layers too."""
        self.folder = folder
        self.bytes_read = 0
        self.shapes = checkpoint_shapes(hf_config)
        self._kind = str(hf_config.model_type)
        self._open: dict[Path, Any] = {}
        self._files = self._listed()
        self._check_nothing_left({self._locate(name)[0] for name in self.shapes})

    def _check_nothing_left(self, used: set[str]) -> None:
        """Raises DataError for weights of layers, or parts of them, that the configuration does not have."""
        left = sorted(name for name in set(self._files) - used if OF_A_LAYER.match(name) and "rotary_emb" not in name)
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise DataError(
                f"{self.folder}: tensor {left[0]}{more} has no place in the model that config.json describes"
            )

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries start..stop-1 along `dim` of the tensor `name`. Raises DataError when its shape is not the model's."""
        key, location = self._locate(name)
        stored, file = self._slice(key), self._files[key]
        shape, stored_shape = self.shapes[name], tuple(stored.get_shape())
        if _shape_within(stored_shape, location) != shape:
            raise DataError(
                f"{file}: {key} has shape {list(stored_shape)}; {name} of this model has shape {list(shape)}"
            )
        window = [slice(0, length) for length in shape]
        window[dim] = slice(start, stop)
        values = stored[_index(window, location, shape)]
        self.bytes_read += values.nbytes
        return values

    def dtypes(self) -> set[str]:
        """The dtypes of the tensors as safetensors calls them: `F32`, `BF16`, ..."""
        return {self._slice(key).get_dtype() for key in {self._locate(name)[0] for name in self.shapes}}

    def _listed(self) -> dict[str, Path]:
        """Every tensor in the folder -> its file."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
                raise DataError(f"{index}: not an index of safetensors files") from error
            outside = [file for _, file in listed if not isinstance(file, str) or Path(file).name != file]
            if outside:
                raise DataError(f"{index}: {outside[0]!r:.80} is no file beside it")
            return {key: self.folder / file for key, file in listed}
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

    def _slice(self, key: str) -> Any:
        file = self._files[key]
        try:
            return self._opened(file).get_slice(key)
        except SafetensorError as error:
            raise DataError(f"{file}: {key} cannot be read: {error}") from error

    def _locate(self, name: str) -> tuple[str, FusedExpert | None]:
        """The key that a tensor has in the files, and where it is in that tensor when experts are fused."""
        if name in self._files:
            return name, None
        location = locate_fused_expert(self._kind, name)
        if location is not None and location.name in self._files:
            return location.name, location
        unblocked = name.replace(".block_sparse_moe.", ".mlp.")  # the router, where experts are fused
        if unblocked in self._files:
            return unblocked, None
        raise DataError(f"{self.folder}: no tensor {name}{did_you_mean(name, self._files)}, which the model has")


def _shape_within(stored_shape: tuple[int, ...], location: FusedExpert | None) -> tuple[int, ...]:
    """The shape of one expert's tensor in a tensor of all experts [E, rows, columns]."""
    if location is None:
        return stored_shape
    _, rows, *columns = stored_shape
    return (rows // 2 if location.half is not None else rows, *columns)


def _index(window: list[slice], location: FusedExpert | None, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    if location is None:
        return tuple(window)
    first = shape[0] * (location.half or 0)
    rows = slice(first + window[0].start, first + window[0].stop)
    return (location.expert, rows, *window[1:])


def local_parameters(chunks: Sequence[nn.Module], decoder: DecoderConfig) -> Iterator[LocalParameter]:
    """Every parameter of this rank, in the same order on all ranks that share one. `chunks` may be wrapped."""
    first_expert = 0
    if decoder.experts is not None:
        num_local = decoder.experts.num_experts // parallel_state.get_expert_model_parallel_world_size()
        first_expert = num_local * parallel_state.get_expert_model_parallel_rank()
    for chunk in chunks:
        model = unwrap(chunk)
        numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
        for name, parameter in model.named_parameters():
            yield LocalParameter(global_name(name, numbers.__getitem__, first_expert), parameter)


@torch.no_grad()
def load(chunks: Sequence[nn.Module], hf_config: Any, source: WeightSource) -> None:
    """Fill every parameter of this rank from `source`, in place; each rank reads its slices only, no rank waits.

    Rows of the vocabulary's padding become zero. Call it before the optimizer is recipe, which copies the weights.
    Raises ConfigError when the model cannot be sharded or converted so, DataError when the source does not fit.
    """
    decoder = DecoderConfig.from_hf_config(hf_config)
    for item in local_parameters(chunks, decoder):
        recipe = mapping_recipe(decoder, item.name, item.position())
        slices = [source.read(s.name, s.dim, s.start, s.stop) for s in recipe.slices]
        _fill(item, recipe, join_groups(slices, recipe.groups))


def _fill(item: LocalParameter, recipe: MappingRecipe, values: Tensor) -> None:
    rows, expected = len(values), tuple(item.parameter.shape)
    fits = rows == expected[0] or (recipe.padded and rows < expected[0])
    if not fits or tuple(values.shape[1:]) != expected[1:]:
        raise ConfigError(
            f"engine: megatron: parameter {item.name} has shape {list(expected)} on this rank, its weights have "
            f"{list(values.shape)}; the configuration of Megatron contradicts that of the model"
        )
    item.parameter[:rows].copy_(values)
    item.parameter[rows:].zero_()
