"""The second stage of a run: LLaMA-Factory's arguments, the tokenizer, and the processes, joined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo, hide_accelerators
from dataflex_mega.llamafactory import args as lf_args
from dataflex_mega.llamafactory.callbacks import load_callbacks
from dataflex_mega.llamafactory.debugging import make_deterministic
from dataflex_mega.llamafactory.model import load_tokenizer
from dataflex_mega.llamafactory.model_checks import check_model
from dataflex_mega.log import get_logger
from dataflex_mega.run import corpus
from dataflex_mega.run.engines import EngineBuilder, engine_factory


@dataclass(frozen=True)
class Session:
    """The configuration, the joined processes and the tokenizer, before any data is read."""

    config: RunConfig
    args: lf_args.LFArgs
    callbacks: list[Any]  # the user's, instances
    tokenizer_module: dict[str, Any]
    template: Any
    engine_builder: EngineBuilder
    collectives: TorchCollectives
    output_dir: Path

    @classmethod
    def start(cls, config: RunConfig) -> Session:
        """Check what can be checked by one process, then join the processes. Raises ConfigError."""
        if config.llamafactory.get("use_cpu"):
            hide_accelerators()
        factory = engine_factory(config)
        args = lf_args.parse_arguments(lf_args.prepare_arguments(corpus.lf_keys(config)))
        make_deterministic(args)
        args.training.overwrite_output_dir = False  # LLaMA-Factory's callback would remove logs; see run.resume
        callbacks = load_callbacks(list(config.dataflex.callbacks))
        tokenizer_module, template = load_tokenizer(args)
        notes = check_model(args, tokenizer_module["tokenizer"], not config.megatron.megatron_pretrained_checkpoint)
        builder = factory.init_processes(args, len(tokenizer_module["tokenizer"]))
        output_dir = Path(args.training.output_dir)
        collectives = TorchCollectives(builder.parallel_info)
        session = cls(config, args, callbacks, tokenizer_module, template, builder, collectives, output_dir)
        session.report(*(f"note: {note}" for note in (*notes, *builder.notes)))
        return session

    @property
    def parallel_info(self) -> ParallelInfo:
        """Rank, device and process groups of this process."""
        return self.engine_builder.parallel_info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of model_name_or_path, as LLaMA-Factory loads it."""
        return self.tokenizer_module["tokenizer"]

    @property
    def score_batch_size(self) -> int:
        """Samples of a forward pass that trains nothing, on one rank."""
        return self.config.dataflex.score_batch_size or self.args.training.per_device_eval_batch_size

    @property
    def data_seed(self) -> int:
        """data_seed, or seed where it is not set."""
        training = self.args.training
        return training.seed if training.data_seed is None else training.data_seed

    def report(self, *lines: str) -> None:
        """Print lines on standard error, once for all processes."""
        if self.parallel_info.is_main:
            for line in lines:
                get_logger().info(line)
