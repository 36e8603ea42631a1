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
    from dataflex_mega.commands._configuration import read_dynamic_config
    from dataflex_mega.offline.sample_sources import PoolSource
    from dataflex_mega.run.data import RunData
    from dataflex_mega.run.roles import RunRoles
    from dataflex_mega.run.session import Session

    without_role = (
        f"{path}: has no role, so its samples have no numbers; give it the selector that will read the result"
    )
    # Nothing is written into output_dir, so it may hold a run.
    config = read_dynamic_config(str(path), [*overrides, "overwrite_output_dir=true"], without_role)
    roles = RunRoles.from_config(config)
    session = Session.start(config)
    data = RunData.load(session, roles)
    if part == "eval" and not data.evaluation:
        raise ConfigError(f"--part: eval needs eval_dataset (or val_size) in {path}")
    pools = [data.pool] if part == "train" else list(data.evaluation.values())
    return PoolSource(pools, session.tokenizer)


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
