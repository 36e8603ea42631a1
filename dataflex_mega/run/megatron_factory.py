"""The Megatron engine's parts: from a Hugging Face configuration to chunks, optimizer and engine."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import init_distributed
from dataflex_mega.engines.megatron import cpu, decoder_config, layout, version
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import EmbeddingSpec

VOCAB_MULTIPLE = 128  # the padded vocabulary is the same for all usual tensor sizes, so that checkpoints may move


class MegatronBackend:
    """Implements run.engines.Backend."""

    def __init__(self, config: RunConfig) -> None:
        """Everything that the configuration, the model's own and the number of processes can tell."""
        version.check()
        from dataflex_mega.engines.megatron.settings import TrainingSettings

        self.config, self.ours, self.keys = config, config.dataflex, config.megatron
        self.layout = layout.read_layout(self.keys, int(os.environ.get("WORLD_SIZE", "1")))
        self.shape = decoder_config.DecoderConfig.from_hf_config(
            _hf_config(config.llamafactory), math.lcm(VOCAB_MULTIPLE, self.layout.tensor)
        )
        accumulation = int(config.llamafactory.get("gradient_accumulation_steps") or 1)
        length = int(config.llamafactory.get("cutoff_len") or 0)
        layout.check_layout(self.layout, self.shape, self.keys, accumulation, length)
        self._settings(
            TrainingSettings("adam", 0.0, 0.0, (0.9, 0.999), 1e-8, 0.0, self._precision())
        )  # for what it refuses

    def start(self, args: Any, tokens: int) -> None:
        """See Backend."""
        from dataflex_mega.engines.megatron import process_groups

        if tokens > self.shape.vocab_size:
            raise ConfigError(
                f"model_name_or_path: the tokenizer has {tokens} tokens, the model {self.shape.vocab_size}; engine: fsdp can "
                "grow the model with resize_vocab"
            )
        self.args = args
        self.settings = self._settings(self._training())
        with cpu.cuda_calls_on_cpu():
            self.parallel_info = process_groups.init_model_parallel(init_distributed(), self.layout)
        self.notes = (f"engine: megatron, {self.layout.describe()}", *self.settings.notes)

    def _settings(self, training: Any) -> Any:
        from dataflex_mega.engines.megatron.settings import build_settings

        with cpu.cuda_calls_on_cpu():
            return build_settings(self.keys, self.layout, self.shape, training)

    def _precision(self) -> str:
        precision = (
            "bf16"
            if self.config.llamafactory.get("bf16")
            else "fp16"
            if self.config.llamafactory.get("fp16")
            else "fp32"
        )
        if precision == "fp16" and cpu.is_needed():
            raise ConfigError("fp16: this machine has no device that trains in fp16; use bf16: true or neither")
        return precision

    def _training(self) -> Any:
        from dataflex_mega.engines.megatron.settings import TrainingSettings

        training = self.args.training
        by_name = "sgd" if str(training.optim).rpartition(".")[2].lower() == "sgd" else "adam"
        return TrainingSettings(
            optimizer=self.keys.optimizer or by_name,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            max_grad_norm=training.max_grad_norm,
            precision=self._precision(),
            packs=bool(self.config.llamafactory.get("packing") or self.config.llamafactory.get("neat_packing")),
        )

    def engine(
        self, tokenizer: Any, domains: int, steps: int, hidden: EmbeddingSpec | None = None, loads: bool = False
    ) -> Any:
        """See Backend."""
        from dataflex_mega.engines.megatron.build import build_chunks, build_engine
        from dataflex_mega.llamafactory.optim import build_scheduler

        options = StepOptions(
            num_domains=domains,
            max_grad_norm=self.args.training.max_grad_norm,
            weight_scope=self.ours.weight_scope,
            normalization=self.ours.loss_normalization,
            on_non_finite=self.ours.on_non_finite,
            count_router_loads=loads,
            embedding_spec=hidden,
        )
        with cpu.cuda_calls_on_cpu():
            chunks = build_chunks(self.shape, self.settings, self.args.training.seed)
            self.fill(chunks)
            schedule = partial(build_scheduler, self.args, steps=steps)
            rows = self.args.training.per_device_train_batch_size
            return build_engine(
                chunks, self.settings, self.layout, self.parallel_info, options, schedule, rows, self._writer()
            )

    def fill(self, chunks: list[Any]) -> None:
        """Weights from a Megatron checkpoint, from names and a seed, or from the Hugging Face folder."""
        from dataflex_mega.engines.megatron import checkpoint, weights
        from dataflex_mega.engines.named_init import NamedInit

        ready_made = self.keys.megatron_pretrained_checkpoint
        if ready_made is not None:
            if not Path(ready_made).is_dir():
                raise ConfigError(f"megatron_pretrained_checkpoint: folder {ready_made} not found")
            checkpoint.load_model(chunks, Path(ready_made))
            return
        hf = self.shape.hf_config
        if self.args.model.train_from_scratch:
            weights.load(chunks, hf, NamedInit(hf, self.args.training.seed))
        else:
            weights.load(chunks, hf, weights.HFCheckpointReader(_folder(self.config.llamafactory), hf))

    def _writer(self) -> Any:
        """(chunks, folder) -> the model in Hugging Face layout, in the precision of its parameters."""
        from dataflex_mega.engines.megatron.export import ExportOptions, export

        options = ExportOptions(generation=_generation_config(self.config.llamafactory))
        return partial(_export, partial(export, dtype=self.settings.model.params_dtype, options=options), self.shape.hf_config)


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
    places = {"revision": keys.get("model_revision") or "main", "cache_dir": keys.get("cache_dir")}
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=bool(keys.get("trust_remote_code")), **places)
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
