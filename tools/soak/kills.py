"""Kill trainings at random moments and compare them, bit by bit, with ones that ran undisturbed.

    python -m tools.soak.kills [N] [--seed S] [--layouts ddp,fsdp2,tp2,pp2] [--folder FOLDER] [--torchrun]

Every trial starts a run under torchrun, or under launcher.py, which forks and is several times as fast. It sends SIGKILL or
SIGTERM to a rank or to the launcher at a random moment (a step, a save, a selection, a reference pass, an export), checks
that no process of the run is left five seconds after the launcher's end, and gives the same command again, up to three kills
a run. Then metrics.jsonl and the exported weights must equal those of the undisturbed run. A SIGTERM must lose no step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tests.support import corpus
from tools.soak.launcher import ForkedRun

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard"},
    "tp2": {"engine": "megatron", "tensor_model_parallel_size": 2},
    "pp2": {"engine": "megatron", "pipeline_model_parallel_size": 2},
}
KILLS_OF_A_RUN = 3
MARK = "DATAFLEX_MEGA_SOAK"  # a variable by which processes of a trial are found
MEASURED = re.compile(r"seconds|per_second|time")
WAIT = 300


@dataclass
class Figures:
    """What came out."""

    kills: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest_left: float = 0.0  # seconds that a process outlived its launcher
    terminated: int = 0
    stopped_after_step: int = 0


def config_of(folder: Path, layout: str, output: Path) -> dict[str, Any]:
    """A short run with all phases; a selector where the engine scores by itself, a reference pass on both."""
    keys: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"), "stage": "pt", "dataset_dir": str(folder / "data"),
        "dataset": "code,prose,tables", "cutoff_len": 32, "finetuning_type": "full", "output_dir": str(output),
        "max_steps": 24, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3,
        "disable_gradient_checkpointing": True, "tensorboard": False, "save_strategy": "steps", "save_steps": 3,
        "save_total_limit": 2, "mixer": "doremi", "selector": "loss", "update_step": 4, "update_times": -1,
        "warmup_step": 2, "reference_model": str(folder / "reference"), "use_cpu": True, "ddp_timeout": 60,
    }  # fmt: skip
    return {**keys, **LAYOUTS[layout]}


class TorchrunRun:
    """A run under torchrun; its processes are found by a variable of their environment."""

    def __init__(self, config: Path, log: Path) -> None:
        self._mark = f"{MARK}={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [*command, "-m", "dataflex_mega.train", str(config)],
                stdout=stream, stderr=stream, env={**os.environ, name: value, "GLOO_SOCKET_IFNAME": "lo"},
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises TimeoutError."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def processes(self) -> dict[int, str]:
        """Live processes of the run -> their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


Run = TorchrunRun | ForkedRun


def start(config: dict[str, Any], log: Path, kind: type[Run]) -> Run:
    """A run on two processes."""
    path = Path(f"{config['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(config))
    return kind(path, log)


def rows(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without measured times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not MEASURED.search(k)} for line in lines]


def differences(output: Path, reference: Path) -> str:
    """What differs between two finished runs; empty when nothing does."""
    if rows(output) != rows(reference):
        return "metrics.jsonl differs"
    for file in sorted(reference.glob("model*.safetensors")):
        expected = load_file(file)
        found = load_file(output / file.name)
        if expected.keys() != found.keys() or not all(expected[name].equal(found[name]) for name in expected):
            return f"{file.name} differs"
    return ""


def last_checkpoint(output: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    steps = [int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return max(steps, default=0)


def wait_until_none_is_left(run: Run, seconds: float, figures: Figures, what: str) -> None:
    """Check that the processes of a trial end in time; end those that do not."""
    begun = time.monotonic()
    while (left := run.processes()) and time.monotonic() - begun < seconds:
        time.sleep(0.05)
    figures.longest_left = max(figures.longest_left, time.monotonic() - begun)
    for process, command in left.items():
        figures.faults.append(f"{what}: left after {seconds:g} s: {command[:100]}")
        os.kill(process, signal.SIGKILL)


def disturb(run: Run, delay: float, dice: random.Random) -> str | None:
    """Send a signal after `delay` seconds -> what was done; None when the run had ended."""
    try:
        run.wait(delay)
        return None
    except TimeoutError:
        pass
    number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    workers = [p for p, command in run.processes().items() if "dataflex_mega.train" in command and p != run.pid]
    target = run.pid if dice.random() < 0.5 or not workers else dice.choice(workers)
    os.kill(target, number)
    return f"{number.name} to {'the launcher' if target == run.pid else 'a rank'}"


def trial(number: int, options: argparse.Namespace, length: float, dice: random.Random, figures: Figures) -> None:
    """One run, killed until it has had its share, then finished and compared."""
    folder, layout = options.folder, options.layouts[number % len(options.layouts)]
    output = folder / f"trial-{number}"
    config, log = config_of(folder, layout, output), folder / f"trial-{number}.log"
    for attempt in range(KILLS_OF_A_RUN + 1):
        run = start(config, log, options.kind)
        kind = disturb(run, dice.uniform(0.1, length), dice) if attempt < KILLS_OF_A_RUN else None
        if kind is None:
            break
        what = f"trial {number} ({layout}), {kind}"
        try:
            status = run.wait(90)
        except TimeoutError:
            figures.faults.append(f"{what}: the launcher did not end")
            run.kill()
            status = run.wait()
        wait_until_none_is_left(run, 5, figures, what)
        figures.kills += 1
        figures.by_kind[kind] = figures.by_kind.get(kind, 0) + 1
        text = log.read_text(errors="replace")
        if "SIGTERM" in kind and status != 0:
            check_stop(text, output, what, figures)
    try:
        status = run.wait(WAIT)
    except TimeoutError:
        run.kill()
        status = run.wait()
    wait_until_none_is_left(run, 5, figures, f"trial {number} ({layout}), the end")
    problem = differences(output, folder / layout) if status == 0 else f"status {status}, see {log}"
    if problem:
        figures.faults.append(f"trial {number} ({layout}): {problem}")
    else:
        shutil.rmtree(output)


def check_stop(text: str, output: Path, what: str, figures: Figures) -> None:
    """After SIGTERM in training: the step that the line names is the newest checkpoint and the last row of the log."""
    figures.terminated += 1
    lines = re.findall(r"stopped by SIGTERM at step (\d+)", text)
    if not lines or last_checkpoint(output) < int(lines[-1]):
        return  # before the first step, or in an earlier attempt
    figures.stopped_after_step += 1
    if last_checkpoint(output) == int(lines[-1]) and rows(output)[-1]["step"] != int(lines[-1]):
        figures.faults.append(f"{what}: steps after {lines[-1]} were lost")


def main() -> int:
    """Command line -> 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--torchrun", dest="kind", action="store_const", const=TorchrunRun, default=ForkedRun)
    options = parser.parse_args()
    options.folder = folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    options.layouts = options.layouts.split(",")
    dice, figures = random.Random(options.seed), Figures()
    if not (folder / "model").exists():
        corpus.write_reference(corpus.write(folder))
    lengths: dict[str, float] = {}
    for layout in options.layouts:
        begun = time.monotonic()
        run = start(config_of(folder, layout, folder / layout), folder / f"{layout}.log", options.kind)
        if run.wait(WAIT):
            print(f"{layout}: the undisturbed run failed, see {folder / layout}.log")
            return 1
        lengths[layout] = time.monotonic() - begun
        print(f"{layout}: undisturbed in {lengths[layout]:.0f} s", flush=True)
    number = 0
    while figures.kills < options.kills:
        trial(number, options, lengths[options.layouts[number % len(options.layouts)]], dice, figures)
        number += 1
        print(f"{figures.kills} kills in {number} runs, {len(figures.faults)} faults", *figures.faults[-1:], flush=True)
    print(f"{figures.kills} kills {figures.by_kind}; {figures.terminated} runs ended by SIGTERM, of them "
          f"{figures.stopped_after_step} after a step; the longest survivor {figures.longest_left:.1f} s")  # fmt: skip
    print(*figures.faults or ["nothing was lost, no process was left"], sep="\n")
    return 1 if figures.faults else 0


if __name__ == "__main__":
    sys.exit(main())
