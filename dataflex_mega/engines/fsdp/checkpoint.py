"""The engine's parameters and optimizer on disk: torch.distributed.checkpoint to resume, Hugging Face layout to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

if TYPE_CHECKING:
    from dataflex_mega.engines.fsdp.engine import FSDPEngine

# Frozen parameters come from the model itself at start-up; only what training changes is stored.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
SCHEDULE = "schedule.json"


def _tensors(engine: FSDPEngine) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(engine.module, options=TRAINED),
        "optimizer": get_optimizer_state_dict(engine.module, engine.optimizer, options=TRAINED),
    }


def save(engine: FSDPEngine, folder: Path) -> None:
    """Each rank writes its shards; the main one the schedule and the loss scale."""
    dcp.save(_tensors(engine), storage_writer=dcp.FileSystemWriter(folder, sync_files=False))
    if engine.mesh.is_main:
        plain = {key: value for key, value in engine.scheduler.state_dict().items() if _is_plain(value)}
        (folder / SCHEDULE).write_text(json.dumps({"scheduler": plain, "scale": engine.scale.state_dict()}))


def load(engine: FSDPEngine, folder: Path) -> None:
    """Read into the engine's present layout, whatever the layout was that wrote it."""
    tensors = _tensors(engine)
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder))
    set_model_state_dict(engine.module, tensors["model"], options=TRAINED)
    set_optimizer_state_dict(engine.module, engine.optimizer, tensors["optimizer"], options=TRAINED)
    saved = json.loads((folder / SCHEDULE).read_text())
    engine.scheduler.load_state_dict(saved["scheduler"])
    engine.scale.load_state_dict(saved["scale"])


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, int | float | str | bool | None)


def export(engine: FSDPEngine, folder: Path) -> None:
    """`save_pretrained` of the model or adapter, in one piece on the main rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(engine.module, options=options)
    if engine.mesh.is_main:
        engine.model.save_pretrained(folder, state_dict=_storable(tensors))
    engine.collectives.barrier()


def _storable(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
