"""What a run needs of an engine before there is one: checks, joined processes, then the model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.base import Engine
from dataflex_mega.engines.capabilities import check_available


class EngineBuilder(Protocol):
    """Builds the model on processes that are joined."""

    @property
    def parallel_info(self) -> ParallelInfo:
        """Rank, device and process groups of this process."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Messages for the user, one line each."""
        ...

    def build_engine(self, tokenizer: Any, num_domains: int, num_steps: int, options: Mapping[str, Any]) -> Engine:
        """The engine for a run of `num_steps` optimizer steps. `options`: fields of StepOptions that algorithms ask for."""
        ...

    def export_state(self, tokenizer: Any, state: Path, folder: Path) -> None:
        """Build the model alone, in one process, fill it from what the engine's `save_state` wrote into `state`, and write
        it into `folder` as the engine's `export` does. Raises CheckpointError for damaged files."""
        ...


class EngineFactory(Protocol):
    """Made from the configuration alone, which it checks."""

    def init_processes(self, args: Any, num_tokens: int) -> EngineBuilder:
        """Join the processes. Raises ConfigError, before that where it can.

        Args:
            args: what llamafactory.args.parse_arguments returned.
            num_tokens: how many the tokenizer has.
        """
        ...


def engine_factory(config: RunConfig) -> EngineFactory:
    """The factory of the run's engine: `make_factory` of the module `run.<engine>_factory`.

    Raises UserError without the packages that the engine needs, and ConfigError for a layout that cannot be; both before any
    process is joined.
    """
    check_available(config.engine)
    return importlib.import_module(f"dataflex_mega.run.{config.engine}_factory").make_factory(config)
