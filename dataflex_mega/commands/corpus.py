"""`dataflex-cli corpus`: text files -> a corpus."""

from __future__ import annotations

from collections.abc import Sequence

SUMMARY = "corpus INPUT ... --output DIR  text files into Megatron .bin/.idx files, one pair per domain"
HELP_ORDER = 100


def main(argv: Sequence[str]) -> int:
    """Forward to corpus.command.main -> the exit status."""
    from dataflex_mega.corpus import command

    return command.main(list(argv))
