"""`dataflex-cli tsds`: chances by optimal transport, for selector tsds."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_mega.commands import _offline

SUMMARY = ""  # the line of `near` names it
HELP_ORDER = 91


def main(argv: Sequence[str]) -> int:
    """Run offline.command, here or under torchrun -> the exit status."""
    return _offline.main("tsds", argv)
