"""Trains the missing runs of a suite: each is the ordinary training command in processes of its own.

Whether a run is finished is read from its own files, so it does not matter which command started it. The training
process holds a lock beside the run's folder, even when the command that started it was killed; no other writes there.
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

from dataflex_mega.checkpoint_folder import PREFIX
from dataflex_mega.compare import step_times
from dataflex_mega.compare.suite import Suite, TrainingRun
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.files import atomic_write
from dataflex_mega.redaction import move_secrets, without_secrets

TRAIN_MODULE = "dataflex_mega.train"
# Keys that change the output and not the result: a finished run stays valid when they change.
OUTPUT_ONLY_KEYS = frozenset(
    "logging_steps disable_tqdm tensorboard plot_loss save_steps save_strategy save_total_limit callbacks "
    "per_device_eval_batch_size preprocessing_num_workers dataloader_num_workers".split()
)
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NNODES",
    "NODE_RANK", "FORCE_TORCHRUN", "RDZV_ID",
)  # fmt: skip
POLL_SECONDS = 0.2  # seconds between two polls of a running process


class RunListener(Protocol):
    """Callbacks during the runs; see progress.ComparisonProgress."""

    def on_begin(self, done: int, total: int) -> None: ...
    def on_run_start(self, run: TrainingRun, step: int) -> None: ...
    def on_step(self, run: TrainingRun, step: int) -> None: ...
    def on_run_end(self, run: TrainingRun, problem: str | None) -> None: ...
    def print_line(self, text: str) -> None: ...


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of `train`. `failed`: run -> reason."""

    trained: list[str]
    failed: dict[str, str]


def is_finished(run: TrainingRun) -> bool:
    """Whether the last step was taken and the model written, read from the files that follow each of them."""
    state = run.folder / "trainer_state.json"
    if not state.is_file() or not (run.folder / "tokenizer_config.json").is_file():
        return False
    try:
        return int(json.loads(state.read_text())["global_step"]) >= run.num_steps
    except (json.JSONDecodeError, KeyError):
        return False


def changed_keys(run: TrainingRun, processes: int) -> list[str]:
    """One text per key whose value has changed since the run was started; empty for a run that was not started."""
    record = run.sibling_file(".json")
    if not run.folder.exists() or not record.is_file():
        return []
    before, now = without_secrets(json.loads(record.read_text())), run_record(run, processes)
    return [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now} - OUTPUT_ONLY_KEYS)
        if before.get(key) != now.get(key)
    ]


def run_record(run: TrainingRun, processes: int) -> dict[str, Any]:
    """The record that identifies a run's result: its configuration, without secrets, and its number of processes."""
    return {**without_secrets(json.loads(json.dumps(run.config))), "processes": processes}


def prepare(suite: Suite, rerun: Sequence[str] = ()) -> list[TrainingRun]:
    """Write the configurations -> the runs that are not finished, in order.

    Args:
        rerun: names of runs, or of methods, whose results are discarded. Discarding a phase discards the later ones too.

    Raises:
        ConfigError: a name that does not exist, or a run that was started with other keys and is not named.
    """
    discard(suite, rerun)
    for run in suite.runs:
        changed = changed_keys(run, suite.processes)
        if changed:
            raise ConfigError(
                f"{run.key}: {changed[0]}{f' (and {len(changed) - 1} more keys)' if changed[1:] else ''}, but "
                f"{run.folder} was trained with the former; --rerun {run.key} starts it over, or use another output_dir"
            )
    for run in suite.runs:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        config, _ = move_secrets(run.config)  # which the run gets through its environment
        atomic_write(run.sibling_file(".yaml"), yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        atomic_write(run.sibling_file(".json"), json.dumps(run_record(run, suite.processes), indent=1))
    return [run for run in suite.runs if not is_finished(run)]


def discard(suite: Suite, names: Sequence[str]) -> None:
    """Remove the results of the named runs. Raises ConfigError for a name of neither a run nor a method."""
    known = [*suite.methods, *dict.fromkeys(f"{run.method}/seed-{run.seed}" for run in suite.runs)]
    known += [run.key for run in suite.runs if run.phase]
    for name in names:
        if name not in known:
            raise ConfigError(f"--rerun {name}: no such run or method{did_you_mean(name, known)}; {', '.join(known)}")
        for run in [run for run in suite.runs if _is_named(suite, run, name)]:
            with lock_run(run) as lock:
                if lock is None:
                    raise ConfigError(f"--rerun {name}: {run.key} is being trained now; stop it first")
                shutil.rmtree(run.folder, ignore_errors=True)
                run.sibling_file(".log").unlink(missing_ok=True)


def _is_named(suite: Suite, run: TrainingRun, name: str) -> bool:
    """Whether `name` is the run, its method, its method with its seed, or an earlier phase."""
    phases = [phase.key for phase in suite.phases_of(run.method, run.seed)]
    earlier = name in phases and phases.index(name) <= phases.index(run.key)
    return earlier or name in (run.method, f"{run.method}/seed-{run.seed}")


# -- training ----------------------------------------------------------------------------------------------------------


def train(suite: Suite, missing: Sequence[TrainingRun], listener: RunListener) -> TrainingOutcome:
    """Train `missing` one after the other. A failed run is reported and does not stop the others.

    Later phases of a method whose earlier phase failed are left out.
    """
    trained: list[str] = []
    failed: dict[str, str] = {}
    listener.on_begin(len(suite.runs) - len(missing), len(suite.runs))
    for run in missing:
        failed_phase = next((r.key for r in suite.phases_of(run.method, run.seed) if r.key in failed), None)
        if failed_phase is not None:
            failed[run.key] = f"{failed_phase} failed"
            continue
        waiting = f"waiting: {run.key} is still being trained by an earlier command"
        with lock_run(run, partial(listener.print_line, waiting)) as lock:
            assert lock is not None
            problem = None if is_finished(run) else _train_one(run, suite.processes, listener, lock)
        listener.on_run_end(run, problem)
        if problem is None:
            trained.append(run.key)
        else:
            failed[run.key] = problem
    return TrainingOutcome(trained, failed)


def _train_one(run: TrainingRun, processes: int, listener: RunListener, lock: int) -> str | None:
    """Train -> None, or the reason of the failure. The training process inherits `lock`, so it keeps it if we are killed."""
    if run.folder.is_dir() and not any(run.folder.glob(f"{PREFIX}*")):
        shutil.rmtree(run.folder)  # stopped before its first checkpoint: nothing to resume from
    listener.on_run_start(run, step_times.read_last_step(run.folder))
    with run.sibling_file(".log").open("ab") as log:
        process = subprocess.Popen(
            command(run, processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of(run),
            pass_fds=[lock],
        )
        try:
            while process.poll() is None:
                listener.on_step(run, step_times.read_last_step(run.folder))
                time.sleep(POLL_SECONDS)
        finally:
            stop(process)
    if process.returncode == 0 and is_finished(run):
        return None
    return f"{last_error_line(run.sibling_file('.log'))} (exit status {process.returncode}; {run.sibling_file('.log')})"


def environment_of(run: TrainingRun) -> dict[str, str]:
    """The variables of a run: ours without a launcher's, and the secrets that its configuration file refers to."""
    _, secrets = move_secrets(run.config)
    return {**{name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}, **secrets}


def command(run: TrainingRun, processes: int) -> list[str]:
    """The command line of one run: the ordinary training command, through torchrun for several processes."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    return [sys.executable, "-m", *launcher, TRAIN_MODULE, str(run.sibling_file(".yaml"))]


def launch_lines(missing: Sequence[TrainingRun], processes: int) -> list[str]:
    """One shell line per run, each after the runs whose files it reads."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [shlex.join([*start, "-m", TRAIN_MODULE, str(run.sibling_file(".yaml"))]) for run in missing]


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Terminate a training that still runs, and kill it after `patience` seconds."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_error_line(log: Path) -> str:
    """The last line with `error:`, otherwise the last line that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()]
    return ([*lines[-1:], *errors] or ["no output"])[-1]


@contextmanager
def lock_run(run: TrainingRun, on_wait: Callable[[], None] | None = None) -> Iterator[int | None]:
    """Hold a run's lock -> its file descriptor.

    When another process holds it: without `on_wait` yield None, otherwise call `on_wait` and wait. The lock ends when the
    last process with the descriptor ends; here it is closed and not unlocked, which would unlock it for all of them.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.sibling_file(".lock").open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                yield None
                return
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()
