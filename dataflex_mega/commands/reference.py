"""`python -m dataflex_mega.commands.reference CONFIG.yaml [key=value ...]`, alone or under torchrun: build the token
losses of a reference model and end. It is what `dataflex-cli reference` starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dataflex_mega.errors import ConfigError, UserError

HELP = """usage: dataflex-cli reference CONFIG.yaml [key=value ...]

Writes the token losses of `reference_model` (a Hugging Face folder) on every sample of the configuration's `dataset` into
`reference_cache` (default: output_dir/reference), for doremi, rho_loss and rho1. Training does the same by itself when they
are not there. A build that was killed goes on where it stopped. Start it under torchrun, or with NPROC_PER_NODE, to
divide the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the cache is complete; 2 and one line for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    try:
        prepare(argv[0], argv[1:])
    except UserError as error:  # found by every rank alike, so said once
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def prepare(path: str, overrides: Sequence[str] = ()) -> None:
    """Build the cache of a configuration. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import split
    from dataflex_mega.distributed import mesh as meshes
    from dataflex_mega.llamafactory.args import keys
    from dataflex_mega.run.build import Opened
    from dataflex_mega.run.reference import cache_of, ensure

    config = split(load(path, overrides), keys())
    if config.ours.train_type == "static":
        raise ConfigError(
            "reference: the configuration has no role; it must have one that reads the losses, such as doremi"
        )
    check_dynamic(config)
    if config.ours.reference_model is None:
        raise ConfigError("reference_model: missing; expected the folder of the model whose losses are to be written")
    finished = False
    try:
        run = Opened(config)
        cache = cache_of(run)
        ensure(run, cache)
        run.say(f"reference: {cache.samples} samples in {cache.folder}")
        finished = True
    finally:
        meshes.stop(orderly=finished)


if __name__ == "__main__":
    sys.exit(main())
