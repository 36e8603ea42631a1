"""A training configuration for a command that trains nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dataflex_mega.config import launchers
from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.environment import check_environment
from dataflex_mega.config.load import load
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.config.paths import named_paths
from dataflex_mega.error_lines import Place
from dataflex_mega.errors import ConfigError


def read_dynamic_config(
    path: str, overrides: Sequence[str], without_role: str, place: Place | None = None
) -> RunConfig:
    """Read and check a configuration. Raises ConfigError, with the message `without_role` for one that has no role.

    `place` is told where the run works.
    """
    from dataflex_mega.llamafactory.args import argument_types

    check_environment(os.environ)
    environment = dict(os.environ)  # before LLaMA-Factory is imported, which removes some of the variables
    config = parse_config(load(path, overrides), argument_types(), environment=environment)
    if place is not None:
        place.folder, place.paths = named_paths(config)
    if config.dataflex.train_type == "static":
        raise ConfigError(without_role)
    launchers.withdraw(os.environ)
    check_dynamic(config)
    return config
