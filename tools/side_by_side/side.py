"""One side of tools/same_numbers.py: `python -P side.py CHECKOUT JOBS.json`, with the package of CHECKOUT importable.

Everything is imported once; each task runs in children forked from this process, one per rank. A job is a list of tasks,
run one after the other in the job's folder. For every job that ends one JSON line goes to standard output.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import shlex
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGE = "dataflex_mega"
CORES, TIMEOUT, CRASHED, TIMED_OUT = 2, 600.0, 70, 124
LISTED_MODELS = ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform")
LIBRARIES = (
    "accelerate", "datasets", "llamafactory.data", "llamafactory.model", "llamafactory.train.tuner", "peft", "sklearn",
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral",
)  # fmt: skip


@dataclass
class Running:
    """A job, with the children of its present task."""

    job: dict[str, Any]
    tasks: list[dict[str, Any]]
    pids: dict[int, int] = field(default_factory=dict)  # process id -> rank
    statuses: list[int] = field(default_factory=list)  # of the tasks that have ended
    codes: list[int] = field(default_factory=list)  # of the present task's ranks that have ended
    began: float = field(default_factory=time.monotonic)
    task_began: float = 0.0

    @property
    def folder(self) -> Path:
        """Where its tasks run."""
        return Path(self.job["folder"])


def preload(checkout: Path) -> None:
    """Import everything a run needs. Raises SystemExit when the package comes from elsewhere."""
    package = importlib.import_module(PACKAGE)
    origin = Path(str(package.__file__)).resolve()
    if not origin.is_relative_to(checkout.resolve()):
        raise SystemExit(f"side: {PACKAGE} comes from {origin}, not from {checkout}")
    for room in ("llamafactory", "lf"):  # the latter up to commit 9201c49
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"{PACKAGE}.{room}.compat").ensure_importable()
            break
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):  # what needs an accelerator or an optional library
                importlib.import_module(module.name)
    for name in LISTED_MODELS:  # LLaMA-Factory asks each for all its configurations, which are imported then
        list(getattr(importlib.import_module("transformers"), name)._model_mapping.keys())


# -- a child -----------------------------------------------------------------------------------------------------------


def call(task: dict[str, Any], checkout: Path) -> int:
    """Run one task in this process -> its exit status."""
    if "script" in task:
        script = checkout / task["script"]
        path = mock.patch.object(sys, "path", [str(script.parent), *sys.path])
        with path, mock.patch.object(sys, "argv", [str(script), *task["argv"]]):
            runpy.run_path(str(script), run_name="__main__")
        return 0
    plots = importlib.import_module(f"{PACKAGE}.plots")
    with mock.patch.object(plots, "plot_run", no_pictures) if hasattr(plots, "plot_run") else contextlib.nullcontext():
        return int(importlib.import_module(task["module"]).main(task["argv"]) or 0)


def no_pictures(*_arguments: object, **_keys: object) -> list[Path]:
    """Stands for `plots.plot_run`: pictures take longer than a small run, and are not compared."""
    return []


def run_child(task: dict[str, Any], folder: Path, checkout: Path) -> int:
    """What a child does after the fork -> its exit status; standard streams go to `log` in the job's folder."""
    import torch

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setpgid(0, 0)
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    try:
        return call(task, checkout)
    except SystemExit as end:
        print("" if isinstance(end.code, int) or end.code is None else end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def fork(task: dict[str, Any], rank: int, environment: dict[str, str], running: Running, checkout: Path) -> int:
    """Start one rank -> its process id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = CRASHED
    if environment:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        status = run_child(task, running.folder, checkout)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# -- the server --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_variables(processes: int) -> dict[str, str]:
    """What torchrun sets, but for the rank; nothing for one process, which runs without a launcher."""
    if processes == 1:
        return {}
    return {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip


def expand(running: Running) -> None:
    """Replace a task that names a file of command lines by the trainings that they start."""
    while running.tasks and "lines" in running.tasks[0]:
        script = running.folder / running.tasks.pop(0)["lines"]
        lines = [shlex.split(line) for line in script.read_text().splitlines()] if script.is_file() else []
        trainings = [
            {"module": f"{PACKAGE}.train", "argv": line[line.index(f"{PACKAGE}.train") + 1 :]}
            for line in lines
            if f"{PACKAGE}.train" in line
        ]
        running.tasks[:0] = trainings


def start_task(running: Running, checkout: Path) -> bool:
    """Start the next task of a job. False when there is none."""
    expand(running)
    if not running.tasks:
        return False
    task = running.tasks.pop(0)
    processes = task.get("processes", running.job["processes"])
    variables = torchrun_variables(processes)
    running.codes, running.task_began = [], time.monotonic()
    for rank in range(processes):
        running.pids[fork(task, rank, variables, running, checkout)] = rank
    return True


def kill_group(pid: int) -> None:
    """End a child and all its children; it is the leader of their group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reap(running: Running) -> bool:
    """Collect the children that have ended. True when the task has."""
    late = time.monotonic() - running.task_began > TIMEOUT
    for pid in list(running.pids):
        if late:
            kill_group(pid)
        ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
        if ended:
            del running.pids[pid]
            kill_group(pid)  # what it has started itself, such as the writer of Megatron's checkpoints
            running.codes.append(TIMED_OUT if late else os.waitstatus_to_exitcode(status))
            if running.codes[-1] not in (0, 2):  # the other ranks would wait for this one
                running.task_began = min(running.task_began, time.monotonic() - TIMEOUT + 10)
    if running.pids:
        return False
    worst = max(running.codes, key=abs)
    running.statuses.append(worst)
    if worst:
        running.tasks.clear()
    return True


def report(running: Running) -> None:
    """Say that a job has ended."""
    seconds = time.monotonic() - running.began
    line = {"folder": running.folder.name, "statuses": running.statuses}
    print(json.dumps({**line, "seconds": round(seconds, 1)}), flush=True)


def serve(jobs: list[dict[str, Any]], checkout: Path) -> None:
    """Run all jobs, as many at a time as there are cores for their processes."""
    active: list[Running] = []
    try:
        work_off(list(jobs), active, checkout)
    finally:  # interrupted: the children are in groups of their own
        for pid in [pid for running in active for pid in running.pids]:
            kill_group(pid)


def work_off(waiting: list[dict[str, Any]], active: list[Running], checkout: Path) -> None:
    """Start what waits when there is room; go on with what has ended a task."""
    while waiting or active:
        free = CORES - sum(running.job["processes"] for running in active)
        while waiting and (waiting[0]["processes"] <= free or not active):
            running = Running(waiting[0], list(waiting[0]["tasks"]))
            free -= waiting.pop(0)["processes"]
            running.folder.mkdir(parents=True, exist_ok=True)
            if start_task(running, checkout):
                active.append(running)
            else:
                report(running)
        for running in [running for running in active if reap(running)]:
            if not start_task(running, checkout):
                active.remove(running)
                report(running)
        time.sleep(0.01)


def stop(_signal: int, _frame: object) -> None:
    """Leave through `finally`, so that no child outlives this process."""
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: list[str]) -> None:
    """Command line."""
    checkout = Path(argv[0])
    signal.signal(signal.SIGTERM, stop)
    preload(checkout)
    serve(json.loads(Path(argv[1]).read_text()), checkout)


if __name__ == "__main__":
    main(sys.argv[1:])
