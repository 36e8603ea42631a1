"""Conversion without training: a Hugging Face folder to a checkpoint of megatron-core, back, and a check of both ways.

A checkpoint (format torch_dist) does not depend on the layout that wrote it; the layout here only says how many processes
share the memory and the work. Every function is called by every process.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dataflex_mega.distributed.mesh import Mesh
from dataflex_mega.engines.megatron import checkpoint, cpu, layout, model
from dataflex_mega.engines.megatron import process_groups as processes
from dataflex_mega.engines.megatron.export import ExportOptions, export
from dataflex_mega.engines.megatron.settings import Training, settings
from dataflex_mega.engines.megatron.shape import Shape
from dataflex_mega.engines.megatron.weights import HFFolder, load
from dataflex_mega.errors import CheckpointError, ConfigError, DataError

TENSORS = "tensors"  # megatron-core wants a folder of its own; the model's configuration and tokenizer lie beside it
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What a Hugging Face folder has beside its weights.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Request:
    """What is converted, and how it is cut meanwhile.

    Attributes:
        keys: config.megatron.MegatronArguments.
        vocab_multiple: what the padded vocabulary of the checkpoint is a multiple of, on top of tensor parallelism.
    """

    source: Path
    target: Path
    keys: Any
    vocab_multiple: int = 1
    options: ExportOptions = field(default_factory=ExportOptions)


def plan(request: Request, config: Any, world: int) -> tuple[layout.Layout, Shape]:
    """How `world` processes cut the model. Raises ConfigError when they cannot; needs no process group."""
    cut = layout.read_layout(request.keys, world)
    if cut.data > 1 and cut.expert == 1:
        raise ConfigError(f"{world} processes for {cut.describe()}: copies of the model have nothing to do here")
    shape = Shape.of(config, request.vocab_multiple * cut.tensor)
    layout.check(cut, shape, request.keys, accumulation=cut.pipeline, length=1)
    return cut, shape


def to_megatron(mesh: Mesh, request: Request) -> None:
    """Hugging Face folder -> checkpoint in the dtype of the folder's weights."""
    config = config_of(request.source)
    weights = HFFolder(request.source, config)
    chunks = _build(mesh, request, config, _dtype(weights))
    load(chunks, config, weights)
    if mesh.is_main:
        _copy_companions(request.source, request.target)
        (request.target / TENSORS).mkdir()
    dist.barrier()
    with cpu.redirected():
        checkpoint.save_model(chunks, request.target / TENSORS)


def to_hf(mesh: Mesh, request: Request) -> None:
    """The inverse of `to_megatron`. The dtype is the one in the configuration."""
    if not (request.source / TENSORS).is_dir():
        raise CheckpointError(
            f"{request.source}: no folder {TENSORS}; not a checkpoint of tools/convert.py to-megatron"
        )
    config = config_of(request.source)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chunks = _build(mesh, request, config, dtype)
    with cpu.redirected():
        checkpoint.load_model(chunks, request.source / TENSORS)
    export(chunks, config, request.target, dtype, request.options)
    if mesh.is_main:
        _copy_companions(request.source, request.target)


def check(mesh: Mesh, request: Request) -> list[str]:
    """Convert there and back in this layout -> on the main process the tensors that are not bit-equal; none is right."""
    config = config_of(request.source)
    weights = HFFolder(request.source, config)
    dtype = _dtype(weights)
    chunks = _build(mesh, request, config, dtype)
    load(chunks, config, weights)
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        dist.broadcast_object_list(shared, src=0)
        export(chunks, config, Path(shared[0]), dtype, request.options)
        differing = _differences(weights, HFFolder(Path(shared[0]), config)) if mesh.is_main else []
        dist.barrier()
    return differing


def _differences(expected: HFFolder, found: HFFolder) -> list[str]:
    return [
        name
        for name, shape in expected.shapes.items()
        if not torch.equal(expected.read(name, 0, 0, shape[0]), found.read(name, 0, 0, shape[0]))
    ]


def config_of(folder: Path) -> Any:
    """The configuration in a folder. Raises DataError when there is none."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; not the folder of a model")
    return AutoConfig.from_pretrained(folder)


def _dtype(weights: HFFolder) -> torch.dtype:
    found = weights.dtypes()
    if len(found) > 1 or not found <= set(DTYPES):
        raise DataError(f"{weights.folder}: weights in {', '.join(sorted(found))}; expected one of {', '.join(DTYPES)}")
    return DTYPES[found.pop()]


def _build(mesh: Mesh, request: Request, config: Any, dtype: torch.dtype) -> list[Any]:
    """This process's chunks, not initialised."""
    cut, shape = plan(request, config, mesh.world)
    training = Training("adam", 0.0, 0.0, (0.9, 0.999), 1e-8, 0.0, PRECISION[dtype])
    made = settings(request.keys, cut, shape, training)
    processes.start(mesh, cut)
    with cpu.redirected():
        model.seed_everything(0)
        return model.build_chunks(shape, made.model, made.transformer_engine)


def _copy_companions(source: Path, target: Path) -> None:
    """Configuration and tokenizer, except what is there already and the index of weight files."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            copy = target / file.name
            if not file.name.endswith(".index.json") and not copy.exists():
                copy.write_bytes(file.read_bytes())
