"""A training configuration for a command that trains nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dataflex_mega.config import launchers
from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.environment import check_environment
from dataflex_mega.config.load import load
from dataflex_mega.config.megatron import engine_of_environment
from dataflex_mega.config.megatron_checks import check_megatron
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.config.paths import named_paths
from dataflex_mega.error_lines import Place
from dataflex_mega.errors import ConfigError
from dataflex_mega.log import log_notes


def read_dynamic_config(
    path: str, overrides: Sequence[str], without_role: str, place: Place | None = None
) -> RunConfig:
    """Read and check a configuration, and write the notes on it. `place` is told where the run works.

    Raises ConfigError, with the message `without_role` for one that has no role.
    """
    from dataflex_mega.llamafactory.args import argument_types

    check_environment(os.environ)
    environment = dict(os.environ)  # before LLaMA-Factory is imported, which removes some of the variables
    variable = engine_of_environment(environment)
    config = parse_config(load(path, overrides), argument_types(), variable, environment)
    if place is not None:
        place.folder, place.paths = named_paths(config)
    if config.dataflex.train_type == "static":
        raise ConfigError(without_role)
    launchers.withdraw(os.environ)
    log_notes([*config.notes, *check_dynamic(config)])
    if config.engine == "megatron":
        log_notes(check_megatron(config))
    return config
