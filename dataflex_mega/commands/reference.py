"""`python -m dataflex_mega.commands.reference CONFIG.yaml [key=value ...]`, alone or under torchrun: build the token
losses of a reference model and end. It is what `dataflex-cli reference` starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataflex_mega.commands import _launcher
from dataflex_mega.error_lines import Place
from dataflex_mega.errors import ConfigError
from dataflex_mega.exit_status import exit_status

HELP = """usage: dataflex-cli reference CONFIG.yaml [key=value ...]

Writes the token losses of `reference_model` (a Hugging Face folder) on every sample of the configuration's `dataset` into
`reference_cache` (default: output_dir/reference), for doremi, rho_loss and rho1. Training does the same by itself when they
are not there. A build that was killed continues where it stopped. Start it under torchrun, or with NPROC_PER_NODE, to
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

    place = Place()

    def action() -> int:
        build_cache(arguments[0], arguments[1:], place)
        return 0

    return exit_status(action, place=place)


def build_cache(path: str, overrides: Sequence[str] = (), place: Place | None = None) -> None:
    """Build the cache of a configuration. Raises UserError."""
    from dataflex_mega.commands._configuration import read_dynamic_config
    from dataflex_mega.distributed.parallel_info import shutdown_distributed
    from dataflex_mega.distributed.peers import NamedPeers
    from dataflex_mega.run.data import RunData
    from dataflex_mega.run.reference import configured_cache, ensure_complete
    from dataflex_mega.run.roles import RunRoles
    from dataflex_mega.run.session import Session

    without_role = "reference: the configuration has no role; it must have one that reads the losses, such as doremi"
    config = read_dynamic_config(path, overrides, without_role, place)
    if config.dataflex.reference_model is None:
        raise ConfigError("reference_model: missing; expected the folder of the model whose losses are to be written")
    finished = False
    try:
        with NamedPeers():
            roles = RunRoles.from_config(config)
            session = Session.start(config)
            data = RunData.load(session, roles)
            cache = configured_cache(session, data.pool)
            ensure_complete(session, data, cache)
            session.report(f"reference: {cache.num_samples} samples in {cache.folder}")
        finished = True
    finally:
        shutdown_distributed(orderly=finished)


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
