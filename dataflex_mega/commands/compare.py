"""`dataflex-cli compare`: methods against each other."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "compare SUITE.yaml             train methods x seeds on the same budget; perplexity, cost, report, plots"
HELP_ORDER = 60


def main(argv: Sequence[str]) -> int:
    """Forward to compare.command.main -> the exit status."""
    from dataflex_mega.compare import command

    return command.main(list(argv))
