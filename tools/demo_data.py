"""The demo data; the first step of `dataflex-cli demo`. `--help` lists the options."""

from __future__ import annotations

import sys

from dataflex_mega.demo.data import *  # noqa: F403  # its functions are this module's too
from dataflex_mega.demo.data import main

if __name__ == "__main__":
    sys.exit(main())
