"""`dataflex-cli setup`: LLaMA-Factory and extras beside the torch that is here."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "setup [--extras A,B]           install LLaMA-Factory, and extras, beside the torch that is here"
HELP_ORDER = 105


def main(argv: Sequence[str]) -> int:
    """Forward to setup.command.run -> the exit status. Raises UserError."""
    from dataflex_mega.setup import command

    return command.run(list(argv))
