"""The second stage of a run: LLaMA-Factory's arguments, the tokenizer, and the processes, joined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo, hide_accelerators
from dataflex_mega.llamafactory import args as lf_args
from dataflex_mega.llamafactory import tokenized
from dataflex_mega.llamafactory.callbacks import load_callbacks
from dataflex_mega.llamafactory.debugging import make_deterministic
from dataflex_mega.llamafactory.model import load_tokenizer
from dataflex_mega.llamafactory.model_checks import check_model
from dataflex_mega.llamafactory.trackers import Trackers, reports
from dataflex_mega.log import get_logger
from dataflex_mega.run import corpus
from dataflex_mega.run.engines import EngineBuilder, engine_factory
from dataflex_mega.run.local_rows import make_local


@dataclass(frozen=True)
class Session:
    """The configuration, the joined processes and the tokenizer, before any data is read."""

    config: RunConfig
    args: lf_args.LFArgs
    callbacks: list[Any]  # the user's, instances
    trackers: Trackers  # of report_to and use_swanlab
    tokenizer_module: dict[str, Any]
    template: Any
    engine_builder: EngineBuilder
    collectives: TorchCollectives
    output_dir: Path
    original_names: Callable[[str], str] = str  # a message with the names of the user's files in place of local copies

    @classmethod
    def start(cls, config: RunConfig) -> Session:
        """Check what can be checked by one process, then join the processes. Raises ConfigError."""
        if config.llamafactory.get("use_cpu"):
            hide_accelerators()
        factory = engine_factory(config)
        args = lf_args.parse_arguments(lf_args.prepare_arguments(corpus.lf_keys(config)))
        make_deterministic(args)
        args.training.overwrite_output_dir = False  # LLaMA-Factory's callback would remove logs; see run.resume
        args.training.report_to = reports(config.llamafactory.get("report_to"))  # parsed without; see prepare_arguments
        callbacks = load_callbacks(list(config.dataflex.callbacks))
        trackers = Trackers.load(args, args.training.report_to, config.dataflex.tensorboard)
        tokenizer_module, template = load_tokenizer(args)
        notes = check_model(args, tokenizer_module["tokenizer"], not config.megatron.megatron_pretrained_checkpoint)
        builder = factory.init_processes(args, len(tokenizer_module["tokenizer"]))
        output_dir = Path(args.training.output_dir)
        collectives = TorchCollectives(builder.parallel_info)
        session = cls(config, args, callbacks, trackers, tokenizer_module, template, builder, collectives, output_dir)
        if config.llamafactory.get("report_to") in ("all", ["all"]):
            notes = [*notes, f"report_to: all are here {', '.join(args.training.report_to) or 'none'}"]
        session.report(*(f"note: {note}" for note in (*notes, *builder.notes)))
        return session._with_local_rows()

    def _with_local_rows(self) -> Session:
        if self.config.dataflex.corpus_dir is not None or self._reads_tokenized_rows():
            return self
        local = make_local(self.args, self.collectives, self.tokenizer, self.output_dir, self.report)
        return replace(self, args=local.args, original_names=local.original_names)

    def _reads_tokenized_rows(self) -> bool:
        path = self.args.data.tokenized_path
        return path is not None and run_on_main(self.collectives, partial(tokenized.is_saved, path))

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
