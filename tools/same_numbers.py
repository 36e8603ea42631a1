"""Compare two checkouts of this repository: do their runs give the same numbers, bit by bit?

    python tools/same_numbers.py [BASE] [--this DIR] [--only PATTERN] [--processes 1 2] [--keep]

BASE and DIR are folders or git revisions. Every YAML below BASE's examples/ is cut to a few steps of a tiny model and
trained with the package of either side, from the same data, on CPU. Compared are logs of steps, orders, weights of domains,
selections, scoreboards, evaluations, TensorBoard's scalars and exported tensors; fields that hold wall-clock time are not.
tools/side_by_side says what is run and what is compared. Status 1: a run differs, or fails on one side only.

Runs of BASE are kept in .same_numbers/ (by the content of BASE, the inputs and the command lines), so later calls train DIR
only. Both sides are copied before they run, so they may be edited meanwhile. At most two processes run at a time.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from side_by_side.files import LEFT_OUT, compare_folders
from side_by_side.runs import Inputs, Job, all_jobs

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "tools" / "side_by_side"
CACHE = ROOT / ".same_numbers"
BASE = "9201c49"
COPIED = ("dataflex_mega", "configs", "examples", "tools")  # of a checkout
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": "0", "LLAMAFACTORY_VERBOSITY": "WARN",
}  # fmt: skip
CLEARED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NNODES",
    "FORCE_TORCHRUN", "USE_RAY", "USE_MCA", "USE_MEGATRON_BRIDGE",
)  # fmt: skip
STATUS_FILE = "ended.json"  # in a job's folder: how it ended, and what it was


@dataclass
class Table:
    """The lines that are printed, counted."""

    equal: int = 0
    differs: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)  # job -> why
    left_out: dict[str, int] = field(default_factory=dict)
    files: int = 0

    def add(self, job: Job, verdict: str) -> None:
        """Count and print one line."""
        name = f"{job.name:<66} {job.processes}"
        if verdict.startswith("equal"):
            self.equal += 1
        elif verdict.startswith("differs"):
            self.differs.append(f"{job.name}, {job.processes} processes")
        else:
            self.not_compared[f"{job.name}, {job.processes} processes"] = verdict.removeprefix("not compared: ")
        print(f"{name}  {verdict}{f' ({job.note})' if job.note else ''}", flush=True)


def copy_checkout(what: str, folder: Path) -> None:
    """Copy a checkout's folder, or extract a revision. Raises SystemExit for one that does not exist."""
    source = Path(what)
    if source.is_dir():
        for name in COPIED:
            shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        return
    command = ["git", "-C", str(ROOT), "archive", what, *COPIED]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise SystemExit(f"same_numbers: {what} is no folder, and {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")


def content_hash(folder: Path, *more: str) -> str:
    """12 hexadecimal digits of all files' names and bytes."""
    sha = hashlib.sha256(repr(more).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        sha.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


def environment(checkout: Path, cache: Path) -> dict[str, str]:
    """Of the processes of one side."""
    kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return {**kept, **ENVIRONMENT, "PYTHONPATH": str(checkout), "HF_DATASETS_CACHE": str(cache)}


def ensure_inputs(base: Path, key: str, work: Path) -> Inputs:
    """Data and models, made with BASE's tools when they are not there yet."""
    script = PARTS / "inputs.py"
    name = hashlib.sha256(f"{key} {platform.python_version()} ".encode() + script.read_bytes()).hexdigest()[:12]
    folder = CACHE / "inputs" / name
    if not folder.is_dir():
        print(f"making the inputs: {folder}", file=sys.stderr, flush=True)
        made = work / "inputs"
        command = [sys.executable, "-P", str(script), str(base), str(made)]
        done = subprocess.run(command, env=environment(base, work / "hf"), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"same_numbers: the inputs cannot be made:\n{done.stderr[-3000:]}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        made.rename(folder)
    return Inputs(folder)


def ended(job: Job, runs: Path) -> dict[str, Any] | None:
    """How a job that is exactly this one ended in a folder of runs; None when it has not been there."""
    try:
        found = json.loads((runs / job.folder_name / STATUS_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return found if found["job"] == job.as_dict() else None


def run_side(checkout: Path, jobs: list[Job], runs: Path, work: Path) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Train all jobs with the package of a checkout -> each with how it ended, as they end."""
    by_name = {job.folder_name: job for job in jobs}
    for name in by_name:
        shutil.rmtree(runs / name, ignore_errors=True)
    listed = [{**job.as_dict(), "folder": str(runs / job.folder_name)} for job in jobs]
    file, errors = work / "jobs.json", work / "errors"
    file.write_text(json.dumps(listed))
    command = [sys.executable, "-P", str(PARTS / "side.py"), str(checkout), str(file)]
    with errors.open("w") as stream, subprocess.Popen(
        command, env=environment(checkout, work / "hf"), stdout=subprocess.PIPE, stderr=stream, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = json.loads(line)
                job = by_name[found.pop("folder")]
                status = {**found, "job": job.as_dict()}
                (runs / job.folder_name / STATUS_FILE).write_text(json.dumps(status))
                yield job, status
            process.wait()
        finally:
            process.terminate()  # nothing, when it has ended by itself
    if process.returncode:
        raise SystemExit(f"same_numbers: the runs of {checkout} ended early:\n{errors.read_text()[-3000:]}")


def last_words(folder: Path) -> str:
    """The last line of a log that says `error`, else the last one."""
    log = folder / "log"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return ([*lines[-1:], *(line for line in lines if "rror:" in line)] or ["no output"])[-1][:200]


def judge(job: Job, first: dict[str, Any], second: dict[str, Any], folders: tuple[Path, Path], table: Table) -> str:
    """The verdict on one job that both sides have run."""
    mine, other = first["statuses"], second["statuses"]
    place = tuple(folder / job.folder_name for folder in folders)
    if mine != other:
        failing = place[1] if any(other) else place[0]
        return f"differs: statuses of the tasks: {mine} | {other}: {last_words(failing)}"
    if mine[-1] not in (0, 2):
        return f"not compared: ends with status {mine[-1]} on both sides: {last_words(place[0])}"
    if mine[-1] == 2:
        return f"not compared: refused by both: {last_words(place[1])}"
    outcome = compare_folders(*(folder / "out" for folder in place))
    for pattern, count in outcome.left_out.items():
        table.left_out[pattern] = table.left_out.get(pattern, 0) + count
    table.files += outcome.compared
    if outcome.difference:
        return f"differs: {outcome.difference}"
    return f"equal: {outcome.compared} files" if outcome.compared else "not compared: writes no file"


def print_summary(table: Table, jobs: list[Job], inputs: Inputs, this: Path) -> None:
    """Counts, and everything that was not compared, with the reason."""
    print(f"\n{table.equal} equal, {len(table.differs)} differ, {len(table.not_compared)} not compared; ", end="")
    print(f"{table.files} files of {len(jobs)} runs")
    for name in table.differs:
        print(f"  differs: {name}")
    for name, why in table.not_compared.items():
        print(f"  not compared: {name}: {why}")
    for pattern, count in sorted(table.left_out.items()):
        print(f"  not compared: {count} x {pattern}: {LEFT_OUT[pattern]}")
    examples = set(inputs.examples())
    own = {str(path.relative_to(this / "examples")) for path in (this / "examples").rglob("*.yaml")}
    idle = sorted(examples - {name for job in jobs for name in job.examples})
    if idle:
        print(f"  not run with these options: {len(idle)} examples: {', '.join(idle)}")
    for name in sorted(examples ^ own):
        print(f"  examples/{name}: only in {'BASE' if name in examples else 'this checkout'}")


@contextmanager
def locked() -> Iterator[None]:
    """Only one call at a time makes inputs and runs of BASE; another one waits and finds them made."""
    with (CACHE / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def prepare_base(options: argparse.Namespace, work: Path) -> tuple[Inputs, list[Job], Path]:
    """Run what is missing of BASE -> (inputs, the jobs that are asked for, the folder of BASE's runs)."""
    base = work / "base"
    copy_checkout(options.base, base)
    key = content_hash(base)
    inputs = ensure_inputs(base, key, work)
    every = all_jobs(inputs, options.processes)
    jobs = [job for job in every if fnmatch.fnmatchcase(job.name, f"*{options.only}*")]
    if not jobs:
        raise SystemExit(f"same_numbers: no run has {options.only!r} in its name; {', '.join(j.name for j in every)}")
    of_base, began = CACHE / "runs" / key, time.monotonic()
    missing = [job for job in jobs if ended(job, of_base) is None]
    for number, (job, found) in enumerate(run_side(base, missing, of_base, work) if missing else (), 1):
        line = f"base: {number}/{len(missing)} {job.name} {job.processes} {found['statuses']} {found['seconds']} s"
        print(line, file=sys.stderr, flush=True)
    print(
        f"base {options.base} ({key}): {len(missing)} of {len(jobs)} run in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return inputs, jobs, of_base


def compare(options: argparse.Namespace, work: Path) -> int:
    """Run both sides, compare, and print the table. Returns the exit status."""
    this, of_this = work / "this", work / "runs"
    copy_checkout(options.this, this)
    with locked():
        inputs, jobs, of_base = prepare_base(options, work)
    table, began = Table(), time.monotonic()
    for job, found in run_side(this, jobs, of_this, work):
        expected = ended(job, of_base)
        assert expected is not None
        table.add(job, judge(job, expected, found, (of_base, of_this), table))
    print_summary(table, jobs, inputs, this)
    print(f"this {options.this}: {len(jobs)} runs in {time.monotonic() - began:.0f} s")
    return 1 if table.differs else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=BASE, help=f"a folder or a git revision ({BASE})")
    parser.add_argument("--this", default=str(ROOT), metavar="DIR", help="the other checkout (the one of this file)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="runs with this in their name, * for anything")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2], choices=(1, 2, 4), help="of a run (1 2); 4 for one example"
    )
    parser.add_argument("--keep", action="store_true", help="leave the files of this side's runs, and say where")
    return parser.parse_args(argv)


def leave(_signal: int, _frame: object) -> None:
    """End through `finally`, which ends the runs too."""
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 1 when a run differs."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, leave)
    CACHE.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="this-", dir=CACHE))
    try:
        return compare(options, work)
    finally:
        if options.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
