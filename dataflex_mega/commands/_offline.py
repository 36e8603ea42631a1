"""`embed`, `near` and `tsds`, and the samples of a training configuration for them.

`python -m dataflex_mega.commands._offline embed | near | tsds ...`, alone or under torchrun, is what `dataflex-cli` starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.commands import _launcher
from dataflex_mega.errors import ConfigError

MODULE = "dataflex_mega.commands._offline"


def open_run(path: Path, part: str, overrides: Sequence[str]) -> Any:
    """The samples of a training configuration: of `dataset`, or of `eval_dataset`. Joins the processes. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.offline.sample_sources import PoolSource
    from dataflex_mega.run.build import Opened

    # Nothing is written into output_dir, so it may hold a run.
    config = parse_config(load(str(path), [*overrides, "overwrite_output_dir=true"]), argument_types())
    if config.dataflex.train_type == "static":
        raise ConfigError(
            f"{path}: has no role, so its samples have no numbers; give it the selector that will read the result"
        )
    check_dynamic(config)
    run = Opened(config)
    if part == "eval" and not run.evaluation:
        raise ConfigError(f"--part: eval needs eval_dataset (or val_size) in {path}")
    pools = [run.pool] if part == "train" else list(run.evaluation.values())
    return PoolSource(pools, run.tokenizer_module["tokenizer"])


def main(name: str, argv: Sequence[str]) -> int:
    """`embed`, `near` or `tsds`, in this process or under torchrun. Returns the exit status."""
    asks_for_help = not argv or argv[0] in ("-h", "--help")
    if asks_for_help or not _launcher.is_needed():
        return run_here([name, *argv])
    return _launcher.launch(MODULE, [name, *argv])


def run_here(argv: Sequence[str]) -> int:
    """Run one of them in this process: see offline.command.main."""
    from dataflex_mega.offline import command

    return command.main(argv, open_run)


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
