"""megatron-core's sharded tensors on disk, written in this process and read without executing anything.

megatron-core's own strategy writes through a pool of processes, whose manager outlives a rank that is killed, and pickles
its index. Here torch's writer does it in the process itself; the content of the files is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter

from dataflex_mega.engines.checkpoint_index import IndexReader, IndexWriter, PlainValues, load_plain

COMMON = "common.pt"  # what is the same on all ranks, such as the optimizer's settings


class SaveSharded(SaveShardedStrategy):
    """Writes with torch's own index for megatron-core and other tools, or with ours."""

    can_handle_sharded_objects = True  # type: ignore[assignment]

    def __init__(self, for_others: bool) -> None:
        super().__init__("torch_dist" if for_others else "dataflex_mega", 1)
        self._for_others = for_others

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Every rank calls it and writes the tensors that it holds the main replica of."""
        sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        tensors = mcore_to_pyt_state_dict(sharded, False)
        folder = Path(checkpoint_dir)
        writer = FileSystemWriter(folder) if self._for_others else IndexWriter(folder)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        dcp.save(tensors, storage_writer=writer, planner=planner)


class _Planner(PlainValues, MCoreLoadPlanner):
    """megatron-core's planner, which checks shapes; values without their code."""


class LoadSharded(TorchDistLoadShardedStrategy):
    """Reads what SaveSharded, megatron-core or Megatron-LM wrote. Executes nothing of it."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        """The tensors that `sharded_state_dict` describes, in its structure. Every rank calls it."""
        wanted = [item for item in nested_values(sharded_state_dict) if isinstance(item, ShardedTensor)]
        planner = _Planner(
            shapes_validation_sharded_tensors=[item for item in wanted if not item.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={item.key: item for item in wanted if item.allow_shape_mismatch},
        )
        sharded, flat_mapping, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors: Any = mcore_to_pyt_state_dict(sharded, True)
        dcp.load(tensors, storage_reader=IndexReader(Path(checkpoint_dir)), planner=planner)
        unwrapped: Any = {key: _unwrap_pyt_sharded_tensor(value) for key, value in tensors.items()}
        state = _replace_sharded_keys_with_state_dict_keys(unwrapped, flat_mapping, renamed)
        _restore_dict_types(state, sharded_state_dict)
        return state


class LoadCommon(LoadCommonStrategy):
    """Reads `common.pt` without its code, or not at all where nothing of it is wanted."""

    can_handle_sharded_objects = True  # type: ignore[assignment]

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        """Raises CheckpointError when the file is damaged or holds more than tensors and plain values."""
        if not self._wanted:
            return {}
        common = load_plain(Path(checkpoint_dir) / COMMON)
        if not isinstance(common, dict):
            raise TypeError(f"{COMMON} holds a {type(common).__name__}")
        return common

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        raise NotImplementedError(f"{checkpoint_dir}: objects are read by the strategy for tensors")

    def check_backend_compatibility(self, loaded_backend: Any) -> None:
        """Any: what is read is checked when it is read."""

    def check_version_compatibility(self, loaded_version: Any) -> None:
        """Any, as for the backend."""
