"""`dataflex-cli train`: in this process, or through torchrun."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_mega.commands import _launcher

SUMMARY = "train CONFIG [key=value ...]   train as a YAML or JSON file says; key=value changes a key for this run"
HELP_ORDER = 10
MODULE = "dataflex_mega.train"


def main(argv: Sequence[str]) -> int:
    """Train here, or start torchrun and wait for it. Returns its exit status."""
    from dataflex_mega.train import main as train_here  # slow: imports torch

    arguments = list(argv)
    asks_for_help = not arguments or arguments[0] in ("-h", "--help", "help")
    if asks_for_help or not _launcher.is_needed():
        return train_here(arguments)
    _launcher.check_configuration(arguments)
    return _launcher.launch(MODULE, arguments, announce=True)
