"""No process outlives the one that it works for: the kernel kills a child when its parent dies (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG = 1
LAUNCHER = "TORCHELASTIC_RUN_ID"  # a variable that torchrun sets in its workers
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh"}
_workers: list[int] = []  # the process, when it ends with its launcher
_ranks: list[int] = []  # the process, when its children end with it


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends; at once when `parent` has died already."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def die_with_launcher() -> None:
    """In a process that torchrun started: end with torchrun, and let no forked child outlive this process.

    Elsewhere nothing changes: who starts a training by hand may leave.
    """
    if LAUNCHER not in os.environ or os.getpid() in _workers or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    name = _name_of(parent)
    if name in SHELLS:
        return
    if parent == 1 and not name.startswith(("python", "torchrun", "pt_")):
        os._exit(1)  # torchrun was killed before this process came here
    die_with_parent(parent)
    _workers[:] = [os.getpid()]
    end_children()


def end_children() -> None:
    """From here on, what the main thread of this process forks ends with the process."""
    if not _ranks and sys.platform.startswith("linux"):
        os.register_at_fork(before=_note_thread, after_in_child=_follow_rank)
    _ranks[:] = [os.getpid()]


def _name_of(process: int) -> str:
    try:
        return (Path("/proc") / str(process) / "comm").read_text().strip()
    except OSError:
        return ""


_forking_threads: list[
    bool
] = []  # whether the main thread forks: a child that another thread made would end with that thread


def _note_thread() -> None:
    _forking_threads[:] = [threading.current_thread() is threading.main_thread()]


def _follow_rank() -> None:
    """In a child of the rank, not in a grandchild: a process that was made a daemon of its own stays one."""
    if _forking_threads == [True] and os.getppid() in _ranks:
        die_with_parent(_ranks[0])
