"""Trains what a suite still lacks: each run is the ordinary training command in processes of its own.

Whether a run is finished is read from what it wrote itself, so it does not matter who started it. A lock beside the
run is held by whoever trains it, also when the one who started it was killed; nobody else writes there meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml

from dataflex_mega.checkpoint import PREFIX
from dataflex_mega.compare import step_times as times
from dataflex_mega.compare.suite import Run, Suite
from dataflex_mega.errors import ConfigError, did_you_mean

TRAIN_MODULE = "dataflex_mega.train"
# Keys that change what is shown and kept, not what is computed: a finished run stays valid when they change.
FREE = frozenset(
    "logging_steps disable_tqdm tensorboard plot_loss save_steps save_strategy save_total_limit callbacks "
    "per_device_eval_batch_size preprocessing_num_workers dataloader_num_workers".split()
)
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NNODES",
    "NODE_RANK", "FORCE_TORCHRUN", "RDZV_ID",
)  # fmt: skip
POLL = 0.2  # seconds between looks at a run


class Watcher(Protocol):
    """Who is told how it goes; see progress.Board."""

    def begin(self, done: int, total: int) -> None: ...
    def start(self, run: Run, step: int) -> None: ...
    def step(self, run: Run, step: int) -> None: ...
    def finish(self, run: Run, problem: str | None) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of the runs. `failed`: run -> why."""

    trained: list[str]
    failed: dict[str, str]


def is_finished(run: Run) -> bool:
    """Whether the last step was taken and the model written, by the files that are written after each."""
    state = run.folder / "trainer_state.json"
    if not state.is_file() or not (run.folder / "tokenizer_config.json").is_file():
        return False
    try:
        return int(json.loads(state.read_text())["global_step"]) >= run.steps
    except (json.JSONDecodeError, KeyError):
        return False


def differences(run: Run, processes: int) -> list[str]:
    """One text for each key that has another value than when the run was started; empty for one that was not."""
    record = run.beside(".json")
    if not run.folder.exists() or not record.is_file():
        return []
    before, now = json.loads(record.read_text()), described(run, processes)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now} - FREE)
        if before.get(key) != now.get(key)
    ]


def described(run: Run, processes: int) -> dict[str, Any]:
    """What decides a run's result: its configuration and how many processes share it."""
    return {**json.loads(json.dumps(run.config)), "processes": processes}


def prepare(suite: Suite, rerun: Sequence[str] = ()) -> list[Run]:
    """Write the configurations -> the runs that are not finished, in order.

    Args:
        rerun: names of runs, or of methods, whose former results are discarded. A phase takes the later ones with it.

    Raises:
        ConfigError: a name that does not exist, or a run that was started with other keys and is not named.
    """
    discard(suite, rerun)
    for run in suite.runs:
        changed = differences(run, suite.processes)
        if changed:
            raise ConfigError(
                f"{run.key}: {changed[0]}{f' (and {len(changed) - 1} more keys)' if changed[1:] else ''}, but "
                f"{run.folder} was trained with the former; --rerun {run.key} starts it over, or use another output_dir"
            )
    for run in suite.runs:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        write_beside(run.beside(".yaml"), yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        write_beside(run.beside(".json"), json.dumps(described(run, suite.processes), indent=1))
    return [run for run in suite.runs if not is_finished(run)]


def write_beside(target: Path, text: str) -> None:
    """Replace a file as a whole: written next to it, then renamed."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)


def discard(suite: Suite, names: Sequence[str]) -> None:
    """Remove what the named runs left. Raises ConfigError for a name of neither a run nor a method."""
    known = [*suite.methods, *dict.fromkeys(f"{run.method}/seed-{run.seed}" for run in suite.runs)]
    known += [run.key for run in suite.runs if run.phase]
    for name in names:
        if name not in known:
            raise ConfigError(f"--rerun {name}: no such run or method{did_you_mean(name, known)}; {', '.join(known)}")
        for run in [run for run in suite.runs if _is_named(suite, run, name)]:
            with locked(run) as lock:
                if lock is None:
                    raise ConfigError(f"--rerun {name}: {run.key} is being trained now; stop it first")
                shutil.rmtree(run.folder, ignore_errors=True)
                run.beside(".log").unlink(missing_ok=True)


def _is_named(suite: Suite, run: Run, name: str) -> bool:
    """Whether `name` is the run, its method, its method with its seed, or an earlier phase."""
    phases = [phase.key for phase in suite.of(run.method, run.seed)]
    earlier = name in phases and phases.index(name) <= phases.index(run.key)
    return earlier or name in (run.method, f"{run.method}/seed-{run.seed}")


# -- training ----------------------------------------------------------------------------------------------------------


def train(suite: Suite, missing: Sequence[Run], watcher: Watcher) -> Outcome:
    """Train `missing` one after the other. A run that fails is told and does not stop the others.

    Later phases of a method whose earlier phase failed are left out.
    """
    trained: list[str] = []
    failed: dict[str, str] = {}
    watcher.begin(len(suite.runs) - len(missing), len(suite.runs))
    for run in missing:
        before = next((r.key for r in suite.of(run.method, run.seed) if r.key in failed), None)
        if before is not None:
            failed[run.key] = f"{before} failed"
            continue
        waiting = f"waiting: {run.key} is still being trained by an earlier command"
        with locked(run, partial(watcher.note, waiting)) as lock:
            assert lock is not None
            problem = None if is_finished(run) else _train_one(run, suite.processes, watcher, lock)
        watcher.finish(run, problem)
        if problem is None:
            trained.append(run.key)
        else:
            failed[run.key] = problem
    return Outcome(trained, failed)


def _train_one(run: Run, processes: int, watcher: Watcher, lock: int) -> str | None:
    """None when trained, else why not. The training inherits `lock`, and so outlives us with it if it must."""
    if run.folder.is_dir() and not any(run.folder.glob(f"{PREFIX}*")):
        shutil.rmtree(run.folder)  # it was stopped before its first checkpoint: nothing to continue from
    watcher.start(run, times.read_last(run.folder))
    with run.beside(".log").open("ab") as log:
        process = subprocess.Popen(
            command(run, processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES},
            pass_fds=[lock],
        )
        try:
            while process.poll() is None:
                watcher.step(run, times.read_last(run.folder))
                time.sleep(POLL)
        finally:
            stop(process)
    if process.returncode == 0 and is_finished(run):
        return None
    return f"{last_words(run.beside('.log'))} (exit status {process.returncode}; {run.beside('.log')})"


def command(run: Run, processes: int) -> list[str]:
    """The command line of one run: the ordinary training command, through torchrun for several processes."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    return [sys.executable, "-m", *launcher, TRAIN_MODULE, str(run.beside(".yaml"))]


def launch_lines(missing: Sequence[Run], processes: int) -> list[str]:
    """One line for a shell for each run, in an order in which no run comes before one that it reads."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [shlex.join([*start, "-m", TRAIN_MODULE, str(run.beside(".yaml"))]) for run in missing]


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a training that still runs, by asking first. `patience` in seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(log: Path) -> str:
    """The last line that says `error:`, else the last line with anything in it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return ([*lines[-1:], *errors] or ["no output"])[-1]


@contextmanager
def locked(run: Run, on_wait: Callable[[], None] | None = None) -> Iterator[int | None]:
    """Hold a run's lock -> its file descriptor.

    When someone else holds it: without `on_wait` None, with it `on_wait` is called and then waited. The lock ends when
    the last process that has the descriptor is gone; it is closed here and not unlocked, which would unlock all of them.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.beside(".lock").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                yield None
                return
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()
