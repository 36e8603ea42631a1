"""`dataflex-cli env`: what this machine can run."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "env                            what this machine can run"
HELP_ORDER = 110


def main(argv: Sequence[str]) -> int:
    """Forward to doctor.main -> the exit status."""
    import dataflex_mega.doctor as doctor

    return doctor.main(list(argv))
