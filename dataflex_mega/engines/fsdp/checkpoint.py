"""Parameters, optimizer and scheduler on disk: torch.distributed.checkpoint to resume, Hugging Face layout to use."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.engines.checkpoint_index import IndexReader, IndexWriter, PlainValues, one_line
from dataflex_mega.engines.fsdp.optimizer_state import optimizer_state, set_optimizer_state
from dataflex_mega.engines.fsdp.precision import LossScaler
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.fsdp.trained_state import model_state, set_model_state, whole_state
from dataflex_mega.engines.schedules import plain_state
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import published_model, system_errors

SCHEDULER_FILE = "schedule.json"
IN_MODEL = "model."  # what the names of the model's tensors begin with in the files


def _tensors(runner: FSDPModelRunner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model_state(runner.module), "optimizer": optimizer_state(runner.module, optimizer)}


def save(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, scheduler: Any, loss_scaler: LossScaler, folder: Path
) -> None:
    """Each rank writes its shards; the main one the learning-rate scheduler and the loss scale."""
    dcp.save(_tensors(runner, optimizer), storage_writer=IndexWriter(folder))
    plain = json.dumps({"scheduler": plain_state(scheduler), "scale": loss_scaler.state_dict()})
    run_on_main(runner.collectives, partial((folder / SCHEDULER_FILE).write_text, plain))


def load(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, scheduler: Any, loss_scaler: LossScaler, folder: Path
) -> None:
    """Read into the present layout, whatever the layout was that wrote it. Raises CheckpointError for damaged files."""
    tensors = _tensors(runner, optimizer)
    with one_line(folder):
        dcp.load(tensors, storage_reader=IndexReader(folder), planner=PlainValues())
        set_model_state(runner.module, tensors["model"])
        set_optimizer_state(runner.module, optimizer, tensors["optimizer"])
    with one_line(folder / SCHEDULER_FILE):
        saved = json.loads((folder / SCHEDULER_FILE).read_text())
        scheduler.load_state_dict(saved["scheduler"])
        loss_scaler.load_state_dict(saved["scale"])


def export(runner: FSDPModelRunner, folder: Path) -> None:
    """`save_pretrained` of the model or adapter, in one piece on the main rank."""
    if hasattr(runner.model, "peft_config"):
        tensors = _adapter_tensors(runner)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(runner.module, options=options)
    run_on_main(runner.collectives, partial(_write_model, runner.model, tensors, folder))


def load_and_export(model: nn.Module, state: Path, folder: Path) -> None:
    """Put what `save` wrote into `state` into a model of this process alone, and write it as `export` does. Raises
    CheckpointError for damaged files and for those of another model."""
    reader = IndexReader(state)
    stored = reader.read_metadata().state_dict_metadata
    dtypes = {
        name.removeprefix(IN_MODEL): item.properties.dtype
        for name, item in stored.items()
        if name.startswith(IN_MODEL) and isinstance(item, TensorStorageMetadata)
    }
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    tensors: dict[str, Any] = {"model": model_state(model)}
    left = sorted(set(dtypes) - set(tensors["model"]))
    if left:
        raise CheckpointError(f"{state}: {len(left)} of its tensors have no place in the model, such as {left[0]}")
    with one_line(state):
        dcp.load(tensors, storage_reader=reader, planner=PlainValues())
        set_model_state(model, tensors["model"])
    _write_model(model, whole_state(model), folder)


def _write_model(model: Any, tensors: dict[str, Any], folder: Path) -> None:
    whole = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    with published_model(folder) as temporary, system_errors(folder):
        model.save_pretrained(temporary, state_dict=whole)


def _adapter_tensors(runner: FSDPModelRunner) -> dict[str, torch.Tensor]:
    """What peft stores of the model, on the main rank; the frozen model is not gathered. Every rank calls it."""
    runner.reshard()  # parameters that an evaluation left gathered are no shards
    model = runner.model
    named = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    names = runner.collectives.broadcast_object(_adapter_names(model, named) if runner.parallel_info.is_main else None)
    tensors = {}
    for name in names:
        whole = _gathered(named[name].detach(), runner.device)
        if runner.parallel_info.is_main:
            tensors[name] = whole.cpu()
    return tensors


def _gathered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """All of a tensor; shards that were offloaded are gathered by the device."""
    return tensor.to(device).full_tensor() if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]


def _adapter_names(model: Any, named: dict[str, torch.Tensor]) -> list[str]:
    """Which of the tensors of a model belong to its adapter, as peft decides; it may look the base model up on a hub."""
    from peft import get_peft_model_state_dict

    kept: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=named)
    of_adapter = {id(tensor) for tensor in kept.values()}
    return [name for name, tensor in named.items() if id(tensor) in of_adapter]
