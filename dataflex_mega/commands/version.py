"""`dataflex-cli version`: the version of the installed package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

SUMMARY = "version                        the version of this package"
HELP_ORDER = 120


def main(argv: Sequence[str]) -> int:
    """Print name and version, from the metadata of the installed package. Returns 0."""
    print(f"dataflex_mega {metadata.version('dataflex_mega')}")
    return 0
