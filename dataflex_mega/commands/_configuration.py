"""A training configuration for a command that trains nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.load import load
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.errors import ConfigError


def read_dynamic_config(path: str, overrides: Sequence[str], without_role: str) -> RunConfig:
    """Read and check a configuration. Raises ConfigError, with the message `without_role` for one that has no role."""
    from dataflex_mega.llamafactory.args import argument_types

    config = parse_config(load(path, overrides), argument_types())
    if config.dataflex.train_type == "static":
        raise ConfigError(without_role)
    check_dynamic(config)
    return config
