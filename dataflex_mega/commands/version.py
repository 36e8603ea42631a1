"""`dataflex-cli version`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

SUMMARY = "version                        the version of this package"
HELP_ORDER = 120


def main(argv: Sequence[str]) -> int:
    """Print the version."""
    print(f"dataflex_mega {metadata.version('dataflex_mega')}")
    return 0
