"""Signals that ask a run to leave: SIGTERM and SIGUSR1, as schedulers send them.

Before the first step there is nothing to lose, and the program ends at once. While training, a signal is a request: the step
is finished, a checkpoint written, and all ranks leave after the same step. A second signal ends the program at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from dataflex_mega.errors import STOPPED, Stopped
from dataflex_mega.log import get_logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST = 5.0  # seconds in which a signal repeats the one before: a scheduler and torchrun both send it
LEAVING = 5.0  # seconds that the main thread has to end the program, where it waits in code that signals do not reach


class StopRequest:
    """What signals have asked for. While `training` a request waits for the end of a step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.training = False

    def requested(self) -> bool:
        """Whether this process was asked to leave."""
        return self.signal is not None

    def note(self, number: int) -> str:
        """Take a signal in -> its name. The first one stays."""
        if self.signal is None:
            self.signal = signal.Signals(number)
        return self.signal.name


@contextmanager
def stop_requests(enabled: bool = True) -> Iterator[StopRequest]:
    """Listen to the signals for a block; afterwards they do what they did before.

    Only the main thread can listen, and not to a signal that is ignored. Raises Stopped inside the block when
    the program has to end at once.
    """
    request = StopRequest()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if _ended.is_set():
            return
        name = request.note(number)
        if not request.training:
            line = _at_once(name)
            get_logger().info(line)
            raise Stopped(line)

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, handle) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN
    }
    _listening.append(os.getpid())
    _ended.clear()
    try:
        with _watched(request), _noting_the_end():
            yield request
    finally:
        _listening.pop()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def default_actions() -> Iterator[None]:
    """Inside a block of `stop_requests`: what signals do without it, for code that has its own idea of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _at_once(name: str) -> str:
    return f"stopped by {name}; the same command goes on from the last checkpoint, where there is one"


@contextmanager
def _watched(request: StopRequest) -> Iterator[None]:
    """A thread that sees signals also while the main thread waits in a library, which Python's handlers do not interrupt."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    former = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    closed = threading.Event()
    thread = threading.Thread(target=_watch, args=(ours, request, closed), name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        signal.set_wakeup_fd(former, warn_on_full_buffer=False)
        theirs.close()  # ends the thread


def _watch(numbers: socket.socket, request: StopRequest, closed: threading.Event) -> None:
    first: float | None = None
    with contextlib.suppress(OSError), numbers:
        while received := numbers.recv(16):
            for number in (one for one in received if one in SIGNALS and not _ended.is_set()):
                name, now = request.note(number), time.monotonic()
                if first is not None and now - first > SAME_REQUEST:
                    _exit_now(f"stopped by a second {name}; the same command goes on from the last checkpoint")
                first = now if first is None else first
                if not request.training and not closed.wait(LEAVING) and not _ended.is_set():
                    _exit_now(_at_once(name))


def _exit_now(line: str) -> NoReturn:
    get_logger().info(line)
    os._exit(STOPPED)


# The program ends already, after a request or an error, whose line is the one to be read. When a rank of torchrun's ends,
# torchrun sends a signal to the others.
_ended = threading.Event()


@contextmanager
def _noting_the_end() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.callback(_ended.set)
        yield
        stack.pop_all()


_listening: list[int] = []  # processes, as often as they listen


def _hold_back() -> None:
    """Before a fork: a signal that comes in the middle of it waits until the child has handlers of its own."""
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _go_on() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _leave_to_parent() -> None:
    """In a child that was forked: a signal to it is no request to its parent."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _go_on()
        _listening.clear()


os.register_at_fork(before=_hold_back, after_in_parent=_go_on, after_in_child=_leave_to_parent)


def when_stopped(request: StopRequest, gather: Callable[[Any], list[Any]]) -> Callable[[int, str], NoReturn]:
    """(step, name of its checkpoint) -> end the run, on every rank. `gather`: a value of each process -> those of all."""

    def stop(step: int, checkpoint: str) -> NoReturn:
        names = [name for name in gather(None if request.signal is None else request.signal.name) if name]
        line = f"stopped by {names[0] if names else 'a signal'} at step {step}; {checkpoint}; the same command goes on"
        get_logger().info(line)
        raise Stopped(line, agreed=True)

    return stop
