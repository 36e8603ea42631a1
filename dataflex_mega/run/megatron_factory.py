"""The Megatron engine's parts: from a Hugging Face configuration to chunks, optimizer and engine."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed import mesh as meshes
from dataflex_mega.engines.megatron import cpu, layout, shape, version
from dataflex_mega.engines.options import Options
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import HiddenSpec

VOCAB_MULTIPLE = 128  # the padded vocabulary is the same for all usual tensor sizes, so that checkpoints may move


class MegatronBackend:
    """Implements run.engines.Backend."""

    def __init__(self, config: RunConfig) -> None:
        """Everything that the configuration, the model's own and the number of processes can tell."""
        version.check()
        from dataflex_mega.engines.megatron.settings import Training

        self.config, self.ours, self.keys = config, config.ours, config.megatron
        self.layout = layout.read_layout(self.keys, int(os.environ.get("WORLD_SIZE", "1")))
        self.shape = shape.Shape.of(_hf_config(config.lf), math.lcm(VOCAB_MULTIPLE, self.layout.tensor))
        accumulation = int(config.lf.get("gradient_accumulation_steps") or 1)
        length = int(config.lf.get("cutoff_len") or 0)
        layout.check(self.layout, self.shape, self.keys, accumulation, length)
        self._settings(Training("adam", 0.0, 0.0, (0.9, 0.999), 1e-8, 0.0, self._precision()))  # for what it refuses

    def start(self, args: Any, tokens: int) -> None:
        """See Backend."""
        from dataflex_mega.engines.megatron import process_groups as processes

        if tokens > self.shape.vocab:
            raise ConfigError(
                f"model_name_or_path: the tokenizer has {tokens} tokens, the model {self.shape.vocab}; engine: fsdp can "
                "grow the model with resize_vocab"
            )
        self.args = args
        self.settings = self._settings(self._training())
        with cpu.redirected():
            self.mesh = processes.start(meshes.start(), self.layout)
        self.notes = (f"engine: megatron, {self.layout.describe()}", *self.settings.notes)

    def _settings(self, training: Any) -> Any:
        from dataflex_mega.engines.megatron.settings import settings

        with cpu.redirected():
            return settings(self.keys, self.layout, self.shape, training)

    def _precision(self) -> str:
        precision = "bf16" if self.config.lf.get("bf16") else "fp16" if self.config.lf.get("fp16") else "fp32"
        if precision == "fp16" and cpu.needed():
            raise ConfigError("fp16: this machine has no device that trains in fp16; use bf16: true or neither")
        return precision

    def _training(self) -> Any:
        from dataflex_mega.engines.megatron.settings import Training

        training = self.args.training
        by_name = "sgd" if str(training.optim).rpartition(".")[2].lower() == "sgd" else "adam"
        return Training(
            optimizer=self.keys.optimizer or by_name,
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            max_grad_norm=training.max_grad_norm,
            precision=self._precision(),
            packs=bool(self.config.lf.get("packing") or self.config.lf.get("neat_packing")),
        )

    def engine(
        self, tokenizer: Any, domains: int, steps: int, hidden: HiddenSpec | None = None, loads: bool = False
    ) -> Any:
        """See Backend."""
        from dataflex_mega.engines.megatron.build import assemble, chunks_of
        from dataflex_mega.llamafactory.optim import build_scheduler

        options = Options(
            domains=domains,
            max_grad_norm=self.args.training.max_grad_norm,
            lookahead=self.ours.lookahead,
            normalization=self.ours.loss_normalization,
            on_nan=self.ours.nan_loss,
            loads=loads,
            hidden=hidden,
        )
        with cpu.redirected():
            chunks = chunks_of(self.shape, self.settings, self.args.training.seed)
            self.fill(chunks)
            schedule = partial(build_scheduler, self.args, steps=steps)
            rows = self.args.training.per_device_train_batch_size
            return assemble(chunks, self.settings, self.layout, self.mesh, options, schedule, rows, self._writer())

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
        hf = self.shape.hf
        if self.args.model.train_from_scratch:
            weights.load(chunks, hf, NamedInit(hf, self.args.training.seed))
        else:
            weights.load(chunks, hf, weights.HFFolder(_folder(self.config.lf), hf))

    def _writer(self) -> Any:
        """(chunks, folder) -> the model in Hugging Face layout, in the precision of its parameters."""
        from dataflex_mega.engines.megatron.export import ExportOptions, export

        options = ExportOptions(generation=_generation_config(self.config.lf))
        return partial(_export, partial(export, dtype=self.settings.model.params_dtype, options=options), self.shape.hf)

    def gradient_scorer(self, engine: Any, adam: bool) -> Any:
        """See Backend."""
        from dataflex_mega.engines.megatron.gradients import GradientScorer

        return GradientScorer(engine, adam)

    def feature_maker(self, engine: Any, spec: Any, adam: bool) -> Any:
        """See Backend."""
        raise ConfigError("gradient features are not there with engine: megatron; engine: fsdp has them")


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
