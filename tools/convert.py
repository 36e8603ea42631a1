"""The same as `dataflex-cli convert`. `python tools/convert.py --help` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataflex_mega.commands import convert
from dataflex_mega.exit_status import exit_status


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a check fails, or 2 after one line that names the mistake."""
    return exit_status(lambda: convert.main(list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
