"""Which process of a job does not answer, is gone, or has failed: a heartbeat of every rank, and the line that names one.

Each rank writes a beat into the store of the process group: a counter, its step and phase, and where its main thread is. A
library's error about a connection or a timeout says nothing of the rank that caused it; the beats do. A rank whose main
thread waits where no exception can come from (as in NCCL) is ended by this thread.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dataflex_mega.errors import TrainingFault, UserError
from dataflex_mega.log import ALL_RANKS, get_logger
from dataflex_mega.types import RunPosition

BEAT_SECONDS = 1.0  # with up to 64 ranks; longer with more, so that the store is not flooded
PATIENT_BEATS = 5  # in one place, after which a rank looks at the others
SILENT_BEATS = 2.5  # beats without a new one that make a rank silent
STORE_TIMEOUT = timedelta(seconds=5)
SILENCE = 600.0  # seconds after which a silent rank ends the job where ddp_timeout is not set
GRACE = 10.0  # seconds that an exception has to come first, from gloo; NCCL ends the process instead
CAUSE_SECONDS = 3.0  # in which a rank that fails tells the others why
CLOSED = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|ncclRemoteError|remote process exited", re.S)
TIMED_OUT = re.compile(r"[Tt]imed? ?out|[Tt]imeout", re.S)
LIBRARY = ("/site-packages/", "/dist-packages/", "<frozen", f"/python{sys.version_info[0]}.{sys.version_info[1]}/")

POSITION = RunPosition()  # where this process is; the training loop writes it


class LostPeer(TrainingFault):
    """Another rank is gone or does not answer. The message names it."""

    is_consequence = True  # of what happened there


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    step: int
    phase: str
    where: str  # file, line and function of the main thread, outside of libraries
    pid: int
    parent: int
    host: str
    cause: str | None = None  # the message of what ended it
    mendable: bool = False  # whether that is a user's mistake


class PeerWatch:
    """The heartbeat of this rank and its view of the others."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float, end: Callable[[int], None]) -> None:
        """`end` is called in the thread with a rank that was silent for longer than `timeout` seconds."""
        self.rank, self.world_size, self.timeout, self._end = rank, world_size, timeout, end
        self.interval = BEAT_SECONDS * max(1, -(-world_size // 64))
        self.grace = 0.0 if torch.cuda.is_available() else GRACE
        self._store = store
        self._count = 0
        self._main = threading.main_thread().ident
        self._stopped = threading.Event()
        self._unchanged = dict.fromkeys(range(world_size), 0)
        self._last_counts: dict[int, int] = {}
        self._place, self._beats_here = (-1, ""), 0
        self._write(None, False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    # -- own beat --------------------------------------------------------------------------------------------------

    def _write(self, cause: str | None, mendable: bool) -> None:
        beat = Beat(
            self._count, POSITION.step, POSITION.phase, self._where(), os.getpid(), os.getppid(), socket.gethostname(),
            cause, mendable,
        )  # fmt: skip
        self._store.set(_key(self.rank), json.dumps(asdict(beat)))

    def _where(self) -> str:
        frame = sys._current_frames().get(cast("int", self._main))
        while frame is not None and any(part in frame.f_code.co_filename for part in LIBRARY):
            frame = frame.f_back
        if frame is None:
            return "a library"
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"

    def _run(self) -> None:
        failures = 0
        while failures < 3 and not self._stopped.wait(self.interval):
            self._count += 1
            try:
                self._write(None, False)
                if self._is_stuck():
                    self._look()
                failures = 0
            except RuntimeError:  # the store is gone or busy
                failures += 1

    def _is_stuck(self) -> bool:
        """Whether this rank has been in one phase of one step for some beats; before that the others do not matter."""
        place = (POSITION.step, POSITION.phase)
        self._beats_here = self._beats_here + 1 if place == self._place else 0
        if self._beats_here == 0:
            self._unchanged = dict.fromkeys(range(self.world_size), 0)
        self._place = place
        return self._beats_here >= PATIENT_BEATS

    def _look(self) -> None:
        """Count the beats that others have missed. Beats of this thread are the clock: it may have been held up itself."""
        for rank, beat in self.beats().items():
            same = self._last_counts.get(rank) == beat.count
            self._unchanged[rank] = self._unchanged[rank] + 1 if same else 0
            self._last_counts[rank] = beat.count
            if (
                self._unchanged[rank] * self.interval >= self.timeout + GRACE
                and beat.cause is None
                and rank != self.rank
            ):
                self._end(rank)

    def stop(self, error: BaseException | None = None) -> None:
        """End the heartbeat; after an error, tell the others what it was."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join(timeout=2 * self.interval)
        if error is not None:
            with suppress(RuntimeError):
                own = isinstance(error, UserError | TrainingFault)
                text = str(error) if own else f"rank {self.rank}: {type(error).__name__}: {_first_line(error)}"
                self._write(text, isinstance(error, UserError))

    # -- others ----------------------------------------------------------------------------------------------------

    def beats(self) -> dict[int, Beat]:
        """Rank -> its last beat, of all ranks that have one. Raises RuntimeError when the store does not answer."""
        keys = {rank: _key(rank) for rank in range(self.world_size)}
        known = {rank: key for rank, key in keys.items() if self._store.check([key])} if not self._last_counts else keys
        if not known:
            return {}
        contents = self._store.multi_get(list(known.values()))
        return {rank: Beat(**json.loads(content)) for rank, content in zip(known, contents, strict=True)}

    def fault(self, error: BaseException) -> Exception:
        """What a library's error about a connection or a timeout means."""
        timed_out = TIMED_OUT.search(str(error)) is not None and CLOSED.search(str(error)) is None
        place = f"{_operation(error.__traceback__)} of {_step_text()}"
        try:
            return self._named(place, timed_out)
        except RuntimeError:
            host = "" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0, "
            return LostPeer(f"{host}which keeps the store of the process group, does not answer, in {place}".lstrip())

    def _named(self, place: str, timed_out: bool) -> Exception:
        first, end = self.beats(), time.monotonic() + max(CAUSE_SECONDS, SILENT_BEATS * self.interval)
        others = [rank for rank in first if rank != self.rank]
        while time.monotonic() < end:
            now = self.beats()
            for rank in others:
                cause = now[rank].cause
                if cause is not None:
                    return UserError(cause) if now[rank].mendable else LostPeer(cause)
            gone = [rank for rank in others if _is_dead(now[rank])]
            if gone:
                return LostPeer(f"{_ranks(gone)} gone (connection closed) in {place}")
            time.sleep(0.2)
        silent = [rank for rank in others if now[rank].count == first[rank].count]
        if silent:
            for rank in silent:
                _kill_stopped(now[rank])
            waited = f" for {_seconds(self.timeout)}" if timed_out else ""
            return LostPeer(f"{_names(silent)} did not answer{waited} while rank {self.rank} waited in {place}")
        elsewhere = [f"rank {rank} is at {now[rank].where} ({now[rank].phase})" for rank in others]
        problem = f"no answer for {_seconds(self.timeout)}" if timed_out else "a connection was closed"
        return LostPeer(f"{problem} in {place}; {', '.join(elsewhere)}")


def _key(rank: int) -> str:
    return f"dataflex_mega/beat/{rank}"


def _seconds(value: float) -> str:
    return f"{value:g} s"


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))


def _ranks(ranks: list[int]) -> str:
    return f"{_names(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def _step_text() -> str:
    return f"step {POSITION.step} ({POSITION.phase})" if POSITION.step else POSITION.phase


def _operation(trace: TracebackType | None) -> str:
    """The collective that an error came out of: `all_reduce`, `the backward pass`."""
    name = "a collective"
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "_engine_run_backward":
            return "the backward pass"
        if "torch/distributed" in code.co_filename and not code.co_name.startswith(("_", "wrapper")):
            name = code.co_name
        trace = trace.tb_next
    return name


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _is_dead(beat: Beat) -> bool:
    """Whether the process of a rank of this machine has ended."""
    if beat.host != socket.gethostname() or beat.parent != os.getppid():
        return False
    try:
        status = (Path("/proc") / str(beat.pid) / "stat").read_text()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"


def _kill_stopped(beat: Beat) -> None:
    """End a silent rank that this process's parent started, so that the launcher need not wait for it."""
    with suppress(OSError, IndexError, ValueError):
        status = (Path("/proc") / str(beat.pid) / "stat").read_text().rpartition(")")[2].split()
        if beat.host == socket.gethostname() and int(status[1]) == beat.parent == os.getppid():
            os.kill(beat.pid, signal.SIGKILL)


# -- of this process -----------------------------------------------------------------------------------------------------

_watches: list[PeerWatch] = []  # none or one


def watch_peers(timeout: timedelta | None) -> None:
    """Begin the heartbeat, once. `timeout`: that of collectives, where it is set."""
    if _watches or dist.get_world_size() == 1:
        return
    default_store: Any = distributed_c10d._get_default_store()
    store = default_store.clone()
    store.set_timeout(STORE_TIMEOUT)
    seconds = SILENCE if timeout is None else timeout.total_seconds()
    _watches.append(PeerWatch(store, dist.get_rank(), dist.get_world_size(), seconds, _end_job))


def _end_job(rank: int) -> None:
    watch = _watches[0]
    with suppress(RuntimeError):
        _kill_stopped(watch.beats()[rank])
    waited = _seconds(watch.timeout)
    get_logger().error("error: rank %s did not answer for %s in %s", rank, waited, _step_text(), extra=ALL_RANKS)
    sys.stderr.flush()
    os._exit(1)


def end_watch(error: BaseException | None = None) -> None:
    """End the heartbeat of this process; after an error, the others are told of it."""
    while _watches:
        _watches.pop().stop(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch.distributed or of a backend is about another process."""
    if isinstance(error, TrainingFault | UserError):
        return False
    named = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return named or (
        isinstance(error, RuntimeError)
        and bool(CLOSED.search(str(error)) or TIMED_OUT.search(str(error)))
        and any(word in str(error) for word in ("gloo", "nccl", "NCCL", "TCPStore", "Socket", "Connection"))
    )


class NamedPeers:
    """A block in which errors that come from another process's end become a LostPeer that names it, or that process's own
    message. Errors of this process are told to the others."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not _watches or isinstance(error, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            end_watch(KeyboardInterrupt("interrupted"))
        elif is_lost_peer(error):
            fault = _watches[0].fault(error)
            end_watch(fault)
            raise fault from error
        else:
            end_watch(error)
