"""A launcher's child: it ends with the launcher, and signals to the launcher reach the processes that train."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dataflex_mega.distributed.orphans import die_with_parent
from dataflex_mega.preemption import SIGNALS


def run_child(command: Sequence[str]) -> int:
    """Run a command and wait -> its exit status, 128 + the signal that ended it.

    SIGTERM and SIGUSR1 go to the children of the command, torchrun's workers, which leave after a step and end torchrun with
    them; to torchrun itself while it has none, or where it would start them again.
    """
    process = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))

    def forward(number: int, _frame: FrameType | None) -> None:
        workers = [] if os.environ.get("MAX_RESTARTS", "0") != "0" else children_of(process.pid)
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        if not workers:
            process.send_signal(signal.SIGTERM)  # torchrun knows no other

    before: dict[signal.Signals, Any] = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:  # the terminal has sent it to all; the line is theirs
                continue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children_of(process: int) -> list[int]:
    """The processes that a process has started and that still run; none where the system does not say."""
    found: list[int] = []
    with suppress(OSError):
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found
