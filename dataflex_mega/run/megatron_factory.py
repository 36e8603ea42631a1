"""The Megatron engine's parts: from a Hugging Face configuration to chunks, optimizer and engine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import (
    DEFAULT_TIMEOUT,
    ParallelInfo,
    init_distributed,
    timeout_of,
)
from dataflex_mega.engines.megatron import checkpoint, cpu, process_groups, weights
from dataflex_mega.engines.megatron.build import build_chunks, build_engine
from dataflex_mega.engines.megatron.decoder_config import DecoderConfig
from dataflex_mega.engines.megatron.engine import MegatronEngine
from dataflex_mega.engines.megatron.export import ExportOptions, export
from dataflex_mega.engines.megatron.layout import MegatronLayout, check_layout, read_layout
from dataflex_mega.engines.megatron.settings import MegatronSettings, TrainingSettings, build_settings
from dataflex_mega.engines.named_init import NamedInit
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.optim import build_scheduler
from dataflex_mega.run.step_options import build_step_options

CUTOFF_LEN = 2048  # LLaMA-Factory's default
VOCAB_MULTIPLE = 128  # the padded vocabulary is the same for all usual tensor sizes, so that checkpoints may move


@dataclass(frozen=True)
class MegatronFactory:
    """Implements run.engines.EngineFactory: checks all that the configuration, the model's own and the number of processes
    can tell."""

    config: RunConfig
    layout: MegatronLayout = field(init=False)
    decoder: DecoderConfig = field(init=False)

    def __post_init__(self) -> None:
        keys, lf_keys = self.config.megatron, self.config.llamafactory
        layout = read_layout(keys, int(os.environ.get("WORLD_SIZE", "1")))
        hf_config = _hf_config(lf_keys)
        decoder = DecoderConfig.from_hf_config(hf_config, math.lcm(VOCAB_MULTIPLE, layout.tensor))
        grad_accumulation = int(lf_keys.get("gradient_accumulation_steps") or 1)
        check_layout(layout, decoder, keys, grad_accumulation, int(lf_keys.get("cutoff_len") or CUTOFF_LEN))
        if lf_keys.get("moe_aux_loss_coef") and decoder.experts is None:
            raise ConfigError(
                f"moe_aux_loss_coef: a {decoder.model_type} has no load-balancing loss; leave the key out"
            )
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "decoder", decoder)
        plain = TrainingSettings("adam", 0.0, 0.0, (0.9, 0.999), 1e-8, 0.0, _precision(lf_keys))
        self._settings(plain)  # for what it refuses

    def init_processes(self, args: Any, num_tokens: int) -> MegatronBuilder:
        """Join the processes into the groups of the layout. Raises ConfigError for a tokenizer larger than the model."""
        if num_tokens > self.decoder.vocab_size:
            raise ConfigError(
                f"model_name_or_path: the tokenizer has {num_tokens} tokens, the model {self.decoder.vocab_size}; "
                "engine: fsdp can grow the model with resize_vocab"
            )
        settings = self._settings(self._training_settings(args))
        with cpu.cuda_calls_on_cpu():
            timeout = timeout_of(self.config.llamafactory)
            parallel_info = process_groups.init_model_parallel(
                init_distributed(timeout), self.layout, timeout or DEFAULT_TIMEOUT
            )
        return MegatronBuilder(self.config, args, parallel_info, self.layout, self.decoder, settings)

    def _settings(self, training: TrainingSettings) -> MegatronSettings:
        with cpu.cuda_calls_on_cpu():
            return build_settings(self.config.megatron, self.layout, self.decoder, training)

    def _training_settings(self, args: Any) -> TrainingSettings:
        training, lf_keys = args.training, self.config.llamafactory
        by_name = "sgd" if str(training.optim).rpartition(".")[2].lower() == "sgd" else "adam"
        return TrainingSettings(
            optimizer=self.config.megatron.optimizer or by_name,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            max_grad_norm=training.max_grad_norm,
            precision=_precision(lf_keys),
            packs=bool(lf_keys.get("packing") or lf_keys.get("neat_packing")),
        )


@dataclass(frozen=True)
class MegatronBuilder:
    """run.engines.EngineBuilder for engine: megatron, on joined processes and a layout."""

    config: RunConfig
    args: Any
    parallel_info: ParallelInfo
    layout: MegatronLayout
    decoder: DecoderConfig
    settings: MegatronSettings

    @property
    def notes(self) -> tuple[str, ...]:
        return (f"engine: megatron, {self.layout.describe()}", *self.settings.notes)

    def build_engine(
        self, tokenizer: Any, num_domains: int, num_steps: int, options: Mapping[str, Any]
    ) -> MegatronEngine:
        """Build this stage's chunks, fill them, then make megatron-core's optimizer."""
        step_options = build_step_options(self.config, self.args, num_domains, options)
        with cpu.cuda_calls_on_cpu():
            chunks = build_chunks(self.decoder, self.settings, self.args.training.seed)
            self.fill(chunks)
            make_scheduler = partial(build_scheduler, self.args, steps=num_steps)
            rows = self.args.training.per_device_train_batch_size
            return build_engine(
                chunks,
                self.settings,
                self.layout,
                self.parallel_info,
                step_options,
                make_scheduler,
                rows,
                self._exporter(),
            )

    def fill(self, chunks: list[Any]) -> None:
        """Weights from a Megatron checkpoint, from names and a seed, or from the Hugging Face folder."""
        pretrained = self.config.megatron.megatron_pretrained_checkpoint
        if pretrained is not None:
            if not Path(pretrained).is_dir():
                raise ConfigError(f"megatron_pretrained_checkpoint: folder {pretrained} not found")
            checkpoint.load_model(chunks, Path(pretrained))
            return
        hf_config = self.decoder.hf_config
        if self.args.model.train_from_scratch:
            weights.load(chunks, hf_config, NamedInit(hf_config, self.args.training.seed))
        else:
            folder = _folder(self.config.llamafactory)
            weights.load(chunks, hf_config, weights.HFCheckpointReader(folder, hf_config))

    def export_state(self, tokenizer: Any, state: Path, folder: Path) -> None:
        """Build the chunks of this process, which is alone, and fill them with the parameters of a checkpoint."""
        with cpu.cuda_calls_on_cpu():
            chunks = build_chunks(self.decoder, self.settings, self.args.training.seed)
            checkpoint.load_model(chunks, state)
            self._exporter(checkpoint.stored_dtype(state))(chunks, folder)

    def _exporter(self, dtype: torch.dtype | None = None) -> Any:
        """(chunks, folder) -> None: write the model in Hugging Face layout, in `dtype` or else that of its parameters."""
        options = ExportOptions(generation=_generation_config(self.config.llamafactory))
        with_dtype = partial(export, dtype=dtype or self.settings.model.params_dtype, options=options)
        return partial(_export, with_dtype, self.decoder.hf_config)


def _precision(lf_keys: dict[str, Any]) -> str:
    precision = "bf16" if lf_keys.get("bf16") else "fp16" if lf_keys.get("fp16") else "fp32"
    if precision == "fp16" and cpu.is_needed():
        raise ConfigError("fp16: this machine has no device that trains in fp16; use bf16: true or neither")
    return precision


def _export(export: Any, hf_config: Any, chunks: list[Any], folder: Path) -> None:
    export(chunks, hf_config, folder)


def _generation_config(keys: dict[str, Any]) -> Any:
    """What the model's folder says of generation; None when it says nothing."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(keys["model_name_or_path"]))
    except OSError:
        return None


def _hf_config(keys: dict[str, Any]) -> Any:
    """The model's configuration. Raises ConfigError when there is none."""
    from transformers import AutoConfig

    name = str(keys["model_name_or_path"])
    hub_options = {"revision": keys.get("model_revision") or "main", "cache_dir": keys.get("cache_dir")}
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=bool(keys.get("trust_remote_code")), **hub_options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path {name!r}: {str(error).strip().splitlines()[0]}") from error


def _folder(keys: dict[str, Any]) -> Path:
    """The model's folder, downloaded first when it is a name on a hub."""
    name = Path(str(keys["model_name_or_path"])).expanduser()
    if name.is_dir():
        return name
    from huggingface_hub import snapshot_download

    revision, cache = keys.get("model_revision") or "main", keys.get("cache_dir")
    return Path(snapshot_download(str(keys["model_name_or_path"]), revision=revision, cache_dir=cache))


def make_factory(config: RunConfig) -> MegatronFactory:
    """What run.engines.engine_factory calls."""
    return MegatronFactory(config)
