"""`dataflex-cli near`: nearest neighbours, for selector near."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_mega.commands import _offline

SUMMARY = (
    "near | tsds --candidates DIR --queries DIR   neighbours or chances from them, for the selectors of these names"
)
HELP_ORDER = 90


def main(argv: Sequence[str]) -> int:
    """Run offline.command, here or under torchrun -> the exit status."""
    return _offline.main("near", argv)
