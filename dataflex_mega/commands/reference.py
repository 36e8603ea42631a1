"""`python -m dataflex_mega.commands.reference CONFIG.yaml [key=value ...]`, alone or under torchrun: build the token
losses of a reference model and end. It is what `dataflex-cli reference` starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataflex_mega.commands import _launcher
from dataflex_mega.commands._status import exit_status
from dataflex_mega.errors import ConfigError

HELP = """usage: dataflex-cli reference CONFIG.yaml [key=value ...]

Writes the token losses of `reference_model` (a Hugging Face folder) on every sample of the configuration's `dataset` into
`reference_cache` (default: output_dir/reference), for doremi, rho_loss and rho1. Training does the same by itself when they
are not there. A build that was killed goes on where it stopped. Start it under torchrun, or with NPROC_PER_NODE, to
divide the work."""


SUMMARY = "reference CONFIG [key=value ...]   write the token losses of reference_model, for doremi, rho_loss and rho1"
HELP_ORDER = 20
MODULE = "dataflex_mega.commands.reference"


def main(argv: Sequence[str]) -> int:
    """Build the cache in this process, or in all processes of torchrun. Returns the exit status."""
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    if not _launcher.is_needed():
        return run_here(arguments)
    _launcher.check_configuration(arguments)
    return _launcher.launch(MODULE, arguments)


def run_here(arguments: Sequence[str]) -> int:
    """Build the cache in this process. 0 when it is complete; see `exit_status` for mistakes."""

    def action() -> int:
        prepare(arguments[0], arguments[1:])
        return 0

    return exit_status(action)


def prepare(path: str, overrides: Sequence[str] = ()) -> None:
    """Build the cache of a configuration. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.distributed.parallel_info import shutdown_distributed
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import Opened
    from dataflex_mega.run.reference import cache_of, ensure

    config = parse_config(load(path, overrides), argument_types())
    if config.dataflex.train_type == "static":
        raise ConfigError(
            "reference: the configuration has no role; it must have one that reads the losses, such as doremi"
        )
    check_dynamic(config)
    if config.dataflex.reference_model is None:
        raise ConfigError("reference_model: missing; expected the folder of the model whose losses are to be written")
    finished = False
    try:
        run = Opened(config)
        cache = cache_of(run)
        ensure(run, cache)
        run.say(f"reference: {cache.num_samples} samples in {cache.folder}")
        finished = True
    finally:
        shutdown_distributed(orderly=finished)


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
