"""Text files -> Megatron .bin/.idx files, one pair per domain, and a manifest. The same as `dataflex-cli corpus`.

`python tools/prepare_corpus.py --help` lists the options.
"""

from __future__ import annotations

import sys

from dataflex_mega.corpus.command import main

if __name__ == "__main__":
    sys.exit(main())
