"""Parameters, optimizer and scheduler on disk: torch.distributed.checkpoint to resume, Hugging Face layout to use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from dataflex_mega.engines.checkpoint_index import IndexReader, IndexWriter, PlainValues, one_line
from dataflex_mega.engines.fsdp.precision import LossScaler
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.schedules import plain_state
from dataflex_mega.files import published_model

# Frozen parameters come from the model itself at start-up; only what training changes is stored.
TRAINABLE_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
SCHEDULER_FILE = "schedule.json"


def _tensors(runner: FSDPModelRunner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(runner.module, options=TRAINABLE_ONLY),
        "optimizer": get_optimizer_state_dict(runner.module, optimizer, options=TRAINABLE_ONLY),
    }


def save(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, scheduler: Any, loss_scaler: LossScaler, folder: Path
) -> None:
    """Each rank writes its shards; the main one the learning-rate scheduler and the loss scale."""
    dcp.save(_tensors(runner, optimizer), storage_writer=IndexWriter(folder))
    if runner.parallel_info.is_main:
        plain = plain_state(scheduler)
        (folder / SCHEDULER_FILE).write_text(json.dumps({"scheduler": plain, "scale": loss_scaler.state_dict()}))


def load(
    runner: FSDPModelRunner, optimizer: torch.optim.Optimizer, scheduler: Any, loss_scaler: LossScaler, folder: Path
) -> None:
    """Read into the present layout, whatever the layout was that wrote it. Raises CheckpointError for damaged files."""
    tensors = _tensors(runner, optimizer)
    with one_line(folder):
        dcp.load(tensors, storage_reader=IndexReader(folder), planner=PlainValues())
        set_model_state_dict(runner.module, tensors["model"], options=TRAINABLE_ONLY)
        set_optimizer_state_dict(runner.module, optimizer, tensors["optimizer"], options=TRAINABLE_ONLY)
    with one_line(folder / SCHEDULER_FILE):
        saved = json.loads((folder / SCHEDULER_FILE).read_text())
        scheduler.load_state_dict(saved["scheduler"])
        loss_scaler.load_state_dict(saved["scale"])


def export(runner: FSDPModelRunner, folder: Path) -> None:
    """`save_pretrained` of the model or adapter, in one piece on the main rank."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(runner.module, options=options)
    if runner.parallel_info.is_main:
        with published_model(folder) as temporary:
            runner.model.save_pretrained(temporary, state_dict=_storable(tensors))
    runner.collectives.barrier()


def _storable(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
