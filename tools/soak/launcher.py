"""A small torchrun whose ranks are forked from a process that has imported everything, so that a trial takes seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from dataflex_mega.distributed.testing import free_port

GRACE = 30.0  # seconds that the other ranks have when one has failed, as with torchrun


class ForkedRun:
    """A run of two ranks, with the methods of subprocess.Popen that a trial uses."""

    def __init__(self, config: Path, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        self._process = context.Process(target=_launch, args=(str(config), str(log), free_port()))
        self._process.start()
        self.pid = self._process.pid or 0

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def processes(self) -> dict[int, str]:
        """Live processes of the run -> what they are. They are of one session, which the launcher has made."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid and fields[0] not in "ZX":
                    found[int(folder.name)] = "launcher" if int(folder.name) == self.pid else "dataflex_mega.train"
        return found


def _launch(config: str, log: str, port: int) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(stream, number)
    ranks: dict[int, int] = {}
    for rank in range(2):
        child = os.fork()
        if child == 0:
            _rank(rank, config, port)
        ranks[child] = rank
    signal.signal(signal.SIGTERM, lambda *_: [_send(child, signal.SIGTERM) for child in ranks])
    worst, deadline = 0, float("inf")
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            del ranks[child]
            code = os.waitstatus_to_exitcode(status)
            if code and not worst:
                worst, deadline = code, time.monotonic() + GRACE
                time.sleep(0.1)
                for other in ranks:
                    _send(other, signal.SIGTERM)
        elif time.monotonic() > deadline:
            for other in ranks:
                _send(other, signal.SIGKILL)
        else:
            time.sleep(0.05)
    os._exit(worst if worst >= 0 else 128 - worst)


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _rank(rank: int, config: str, port: int) -> None:
    import torch

    from dataflex_mega.train import main

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_RUN_ID="soak",
    )  # fmt: skip
    torch.set_num_threads(1)
    status: Any = 1
    stream = os.fdopen(2, "w", buffering=1)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            status = main([config])
        except SystemExit as stop:
            status = stop.code
        finally:
            stream.flush()
            os._exit(status if isinstance(status, int) else 1)
