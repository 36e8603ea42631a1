"""`python -m dataflex_mega` is `dataflex-cli`."""

import sys

from dataflex_mega.cli import main

if __name__ == "__main__":
    sys.exit(main())
