"""`python -m dataflex_mega.distributed.torchrun ...`: torchrun, without its own report of processes that failed.

The process that failed has said why in one line; torchrun adds a table and a traceback of itself. The exit status is that of
the processes, where torchrun's is 1.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as run_torchrun

FAULT, SIGNALLED = 1, 128
REPORTS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def main(arguments: list[str]) -> int:
    """Run torchrun with its own arguments -> 0, or the largest status of a process: what ended the first, where the others
    ended with 1 for having lost it. 1 where all were killed."""
    for name in REPORTS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run_torchrun(arguments)
    except ChildFailedError as error:
        return max(FAULT, *(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:  # to torchrun, which passed it on
        return SIGNALLED + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
