"""The same as `dataflex-cli perplexity`. `python tools/eval_perplexity.py --help` lists the options."""

from __future__ import annotations

import sys

from dataflex_mega.commands.perplexity import main
from dataflex_mega.exit_status import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
