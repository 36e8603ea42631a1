"""What a run needs of an engine before and around training: processes, model, optimizer."""

from __future__ import annotations

from typing import Any, Protocol

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.base import Engine
from dataflex_mega.types import EmbeddingSpec


class Backend(Protocol):
    """Made from the configuration alone, which it checks; then it joins the processes; then it builds the model."""

    parallel_info: ParallelInfo  # from `start` on
    notes: tuple[str, ...]  # what the user should be told, from `start` on

    def start(self, args: Any, tokens: int) -> None:
        """Join the processes. Raises ConfigError, before that where it can.

        Args:
            args: what llamafactory.args.parse_arguments returned.
            tokens: how many the tokenizer has.
        """
        ...

    def engine(
        self, tokenizer: Any, domains: int, steps: int, hidden: EmbeddingSpec | None = None, loads: bool = False
    ) -> Engine:
        """The engine for a run of `steps` optimizer steps over `domains` domains.

        `hidden`: what its weighter compares. `loads`: whether its mixer needs the routers' counts.
        """
        ...


def backend_of(config: RunConfig) -> Backend:
    """The backend of the run's engine. Raises ConfigError for a layout that cannot be, before any process is joined."""
    if config.engine == "megatron":
        from dataflex_mega.run.megatron_factory import MegatronBackend

        return MegatronBackend(config)
    from dataflex_mega.run.fsdp_factory import FSDPBackend

    return FSDPBackend(config)
