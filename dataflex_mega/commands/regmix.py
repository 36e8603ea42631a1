"""`dataflex-cli regmix`: proportions from many small runs."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "regmix STUDY.yaml              propose proportions of the domains from many small runs"
HELP_ORDER = 70


def main(argv: Sequence[str]) -> int:
    """Forward to compare.study.main -> the exit status."""
    from dataflex_mega.compare import study

    return study.main(list(argv))
