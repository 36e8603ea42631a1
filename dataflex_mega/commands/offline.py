"""The samples of a training configuration, for the offline tools.

`python -m dataflex_mega.commands.offline embed | near | tsds ...`, alone or under torchrun, is what `dataflex-cli` starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dataflex_mega.errors import ConfigError
from dataflex_mega.offline import command
from dataflex_mega.offline.sources import PoolSource


def open_run(path: Path, part: str, overrides: Sequence[str]) -> PoolSource:
    """The samples of a training configuration: of `dataset`, or of `eval_dataset`. Joins the processes. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import split
    from dataflex_mega.llamafactory.args import keys
    from dataflex_mega.run.build import Opened

    # Nothing is written into output_dir, so it may hold a run.
    config = split(load(str(path), [*overrides, "overwrite_output_dir=true"]), keys())
    if config.ours.train_type == "static":
        raise ConfigError(
            f"{path}: has no role, so its samples have no numbers; give it the selector that will read the result"
        )
    check_dynamic(config)
    run = Opened(config)
    if part == "eval" and not run.evaluation:
        raise ConfigError(f"--part: eval needs eval_dataset (or val_size) in {path}")
    pools = [run.pool] if part == "train" else list(run.evaluation.values())
    return PoolSource(pools, run.tokenizer_module["tokenizer"])


def main(argv: Sequence[str] | None = None) -> int:
    """See offline.command.main."""
    return command.main(sys.argv[1:] if argv is None else argv, open_run)


if __name__ == "__main__":
    sys.exit(main())
