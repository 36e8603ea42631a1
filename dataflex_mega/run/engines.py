"""What a run needs of an engine before there is one: checks, joined processes, then the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.base import Engine
from dataflex_mega.engines.megatron import version
from dataflex_mega.run.fsdp_factory import FSDPFactory


class EngineBuilder(Protocol):
    """Builds the model on processes that are joined."""

    @property
    def parallel_info(self) -> ParallelInfo:
        """Which process this is."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told."""
        ...

    def build_engine(self, tokenizer: Any, num_domains: int, num_steps: int, options: Mapping[str, Any]) -> Engine:
        """The engine for a run of `num_steps` optimizer steps. `options`: fields of StepOptions that algorithms ask for."""
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
    """The factory of the run's engine. Raises ConfigError for a layout that cannot be, before any process is joined."""
    if config.engine == "megatron":
        version.check()
        from dataflex_mega.run.megatron_factory import MegatronFactory  # needs megatron-core, an optional dependency

        return MegatronFactory(config)
    return FSDPFactory(config)
