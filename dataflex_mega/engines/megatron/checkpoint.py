"""Parameters and optimizer through megatron-core's distributed checkpoints, which any other layout can read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.engines.checkpoint_index import one_line, read_index
from dataflex_mega.engines.megatron.lr_adapter import LRSchedulerAdapter
from dataflex_mega.engines.megatron.runner import MegatronModelRunner
from dataflex_mega.engines.megatron.sharded_files import LoadCommon, LoadSharded, SaveSharded
from dataflex_mega.engines.megatron.wrapping import unwrap
from dataflex_mega.errors import CheckpointError

SCHEDULER_FILE = "schedule.json"
TENSORS = "tensors"  # a folder of its own, because megatron-core wants it empty
# Each optimizer tensor is stored in the shape of its parameter, so that tensor, pipeline and data sizes may change.
# megatron-core adds its process group to the mapping it gets, hence the copies.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(runner: MegatronModelRunner, optimizer: Any, lr_scheduler: LRSchedulerAdapter, folder: Path) -> None:
    """Every rank writes its shards, the main one the learning-rate scheduler."""
    target = folder / TENSORS
    run_on_main(runner.collectives, partial(target.mkdir, parents=True, exist_ok=True))
    strategy = SaveSharded(for_others=False)
    dist_checkpointing.save(
        _tensors(runner, optimizer, loading=False), str(target), strategy, content_metadata=METADATA
    )
    schedule = json.dumps(lr_scheduler.state_dict())
    run_on_main(runner.collectives, partial((folder / SCHEDULER_FILE).write_text, schedule))


def load(runner: MegatronModelRunner, optimizer: Any, lr_scheduler: LRSchedulerAdapter, folder: Path) -> None:
    """Read into the present layout, whatever the layout was that wrote it. Raises CheckpointError for damaged files."""
    for chained in optimizer.chained_optimizers:
        _prepare(chained)
    tensors = _tensors(runner, optimizer, loading=True)
    with one_line(folder / TENSORS, CheckpointingException):
        state: Any = dist_checkpointing.load(tensors, str(folder / TENSORS), LoadSharded(), LoadCommon(wanted=True))
        for name, chunk in _chunks(runner.model_chunks).items():
            chunk.load_state_dict(state[name])
        _fill(optimizer, state["optimizer"])
    with one_line(folder / SCHEDULER_FILE):
        lr_scheduler.load_state_dict(json.loads((folder / SCHEDULER_FILE).read_text()))


def save_model(chunks: list[Any], folder: Path) -> None:
    """Parameters alone, for any program with megatron-core. Every rank calls it; `folder` exists and is empty."""
    tensors = {name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in _chunks(chunks).items()}
    dist_checkpointing.save(tensors, str(folder), SaveSharded(for_others=True), content_metadata=METADATA)


def load_model(chunks: list[Any], folder: Path) -> None:
    """Parameters alone, from what `save_model`, `save`, megatron-core or Megatron-LM wrote. Raises CheckpointError."""
    source = folder / TENSORS if (folder / TENSORS).is_dir() else folder
    tensors = {name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in _chunks(chunks).items()}
    with one_line(source, CheckpointingException):
        state: Any = dist_checkpointing.load(tensors, str(source), LoadSharded(), LoadCommon(wanted=False))
        for name, chunk in _chunks(chunks).items():
            chunk.load_state_dict(state[name])


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the parameters that `save` wrote. Raises CheckpointError."""
    source = folder / TENSORS if (folder / TENSORS).is_dir() else folder
    for name, item in read_index(source).state_dict_metadata.items():
        if not name.startswith("optimizer") and isinstance(item, TensorStorageMetadata):
            return item.properties.dtype
    raise CheckpointError(f"{source}: no parameter of a model is in it")


def _chunks(chunks: list[Any]) -> dict[str, Any]:
    """Name -> the chunk; tensors are stored under their names in the whole model, so these names are only local."""
    return {f"model{number}": unwrap(chunk) for number, chunk in enumerate(chunks)}


def _tensors(runner: MegatronModelRunner, optimizer: Any, loading: bool) -> dict[str, Any]:
    model = {
        name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in _chunks(runner.model_chunks).items()
    }
    optimizer_state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(METADATA))
    return {**model, "optimizer": optimizer_state}


def _prepare(part: Any) -> None:
    """Give torch's optimizers the state that a first step would make: megatron-core loads into existing tensors."""
    if part.init_state_fn is None:  # SGD, which remembers nothing
        part.init_state_fn = _nothing_to_make
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _fill(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Load what was read into megatron-core's optimizer, which is a chain of one or several."""
    chain = optimizer.chained_optimizers
    states = [loaded] if len(chain) == 1 else [loaded[number] for number in sorted(loaded)]
    for part, state in zip(chain, states, strict=True):
        tensors = state.pop("param_state", None)
        part.load_state_dict(state)
        if tensors is None:
            continue
        # megatron-core copies every entry of the optimizer's state, but the one that torch's Adam counts steps with is not
        # among the tensors; and it has made one such entry for all parameters, each of which would count it up.
        inner = part.optimizer.state
        steps = {parameter: entries.pop("step") for parameter, entries in inner.items() if "step" in entries}
        part.load_parameter_state_from_fully_reshardable(tensors)
        for parameter, step in steps.items():
            inner[parameter]["step"] = step.clone()


def _nothing_to_make(_optimizer: nn.Module, _config: Any = None) -> None:
    """In place of a function that makes optimizer state."""
