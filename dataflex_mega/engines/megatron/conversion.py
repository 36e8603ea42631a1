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

from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.megatron import checkpoint, cpu, model, process_groups
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.export import ExportOptions, export
from dataflex_mega.engines.megatron.layout import MegatronLayout, check_layout, read_layout
from dataflex_mega.engines.megatron.settings import TrainingSettings, build_settings
from dataflex_mega.engines.megatron.weights import HFCheckpointReader, load
from dataflex_mega.errors import CheckpointError, ConfigError, DataError
from dataflex_mega.files import atomic_write

TENSORS = "tensors"  # megatron-core wants a folder of its own; the model's configuration and tokenizer lie beside it
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What a Hugging Face folder has beside its weights.
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class ConversionRequest:
    """What is converted, and how it is sharded meanwhile.

    Attributes:
        keys: config.megatron.MegatronArguments.
        vocab_multiple: what the padded vocabulary of the checkpoint is a multiple of, on top of tensor parallelism.
    """

    source: Path
    target: Path
    keys: Any
    vocab_multiple: int = 1
    options: ExportOptions = field(default_factory=ExportOptions)


def plan(request: ConversionRequest, config: Any, world: int) -> tuple[MegatronLayout, DecoderConfig]:
    """How `world` processes shard the model. Raises ConfigError when they cannot; needs no process group."""
    layout = read_layout(request.keys, world)
    if layout.data > 1 and layout.expert == 1:
        raise ConfigError(f"{world} processes for {layout.describe()}: copies of the model have nothing to do here")
    decoder = DecoderConfig.from_hf_config(config, request.vocab_multiple * layout.tensor)
    check_layout(layout, decoder, request.keys, grad_accumulation=layout.pipeline, length=1)
    return layout, decoder


def to_megatron(parallel_info: ParallelInfo, request: ConversionRequest) -> None:
    """Hugging Face folder -> checkpoint in the dtype of the folder's weights."""
    config = config_of(request.source)
    weights = HFCheckpointReader(request.source, config)
    chunks = _build(parallel_info, request, config, _dtype(weights))
    load(chunks, config, weights)
    if parallel_info.is_main:
        _copy_companions(request.source, request.target)
        (request.target / TENSORS).mkdir()
    dist.barrier()
    with cpu.cuda_calls_on_cpu():
        checkpoint.save_model(chunks, request.target / TENSORS)


def to_hf(parallel_info: ParallelInfo, request: ConversionRequest) -> None:
    """The inverse of `to_megatron`. The dtype is the one in the configuration."""
    if not (request.source / TENSORS).is_dir():
        raise CheckpointError(
            f"{request.source}: no folder {TENSORS}; not a checkpoint of dataflex-cli convert to-megatron"
        )
    config = config_of(request.source)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    chunks = _build(parallel_info, request, config, dtype)
    with cpu.cuda_calls_on_cpu():
        checkpoint.load_model(chunks, request.source / TENSORS)
    export(chunks, config, request.target, dtype, request.options)
    if parallel_info.is_main:
        _copy_companions(request.source, request.target)


def check(parallel_info: ParallelInfo, request: ConversionRequest) -> list[str]:
    """Convert there and back in this layout -> on the main process the tensors that are not bit-equal; none is right."""
    config = config_of(request.source)
    weights = HFCheckpointReader(request.source, config)
    dtype = _dtype(weights)
    chunks = _build(parallel_info, request, config, dtype)
    load(chunks, config, weights)
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        dist.broadcast_object_list(shared, src=0)
        export(chunks, config, Path(shared[0]), dtype, request.options)
        differing = _differences(weights, HFCheckpointReader(Path(shared[0]), config)) if parallel_info.is_main else []
        dist.barrier()
    return differing


def _differences(expected: HFCheckpointReader, actual: HFCheckpointReader) -> list[str]:
    return [
        name
        for name, shape in expected.shapes.items()
        if not torch.equal(expected.read(name, 0, 0, shape[0]), actual.read(name, 0, 0, shape[0]))
    ]


def config_of(folder: Path) -> Any:
    """The configuration in a folder. Raises DataError when there is none."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; not the folder of a model")
    return AutoConfig.from_pretrained(folder)


def _dtype(weights: HFCheckpointReader) -> torch.dtype:
    dtypes = weights.dtypes()
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise DataError(
            f"{weights.folder}: weights in {', '.join(sorted(dtypes))}; expected one of {', '.join(DTYPES)}"
        )
    return DTYPES[dtypes.pop()]


def _build(parallel_info: ParallelInfo, request: ConversionRequest, config: Any, dtype: torch.dtype) -> list[Any]:
    """The model chunks of this process, with parameters that are not initialised."""
    layout, decoder = plan(request, config, parallel_info.world_size)
    training = TrainingSettings("adam", 0.0, 0.0, (0.9, 0.999), 1e-8, 0.0, PRECISION[dtype])
    settings = build_settings(request.keys, layout, decoder, training)
    process_groups.init_model_parallel(parallel_info, layout)
    with cpu.cuda_calls_on_cpu():
        model.seed_everything(0)
        return model.create_chunks(decoder, settings.model, settings.transformer_engine)


def _copy_companions(source: Path, target: Path) -> None:
    """Configuration and tokenizer, except what is there already and the index of weight files."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            copy = target / file.name
            if not file.name.endswith(".index.json") and not copy.exists():
                atomic_write(copy, file.read_bytes())
