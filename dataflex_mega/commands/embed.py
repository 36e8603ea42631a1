"""`dataflex-cli embed`: vectors of samples."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex_mega.commands import _offline

SUMMARY = "embed SOURCE --model M --output DIR   a vector for every sample of a configuration or a JSON file"
HELP_ORDER = 80


def main(argv: Sequence[str]) -> int:
    """Run offline.command, here or under torchrun -> the exit status."""
    return _offline.main("embed", argv)
