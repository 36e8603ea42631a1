"""Cut the power at random moments around checkpoints, and resume from what is on the disk then.

A run with `save_total_limit: 1` writes to an ext4 file system in a file that is mounted through a loop device. The file is
copied at random moments: the copy is what the disk of a machine would hold whose power failed then. Each copy is mounted,
and the same command is given again there. Right is: it begins from a whole checkpoint as soon as one was ever durable, and
every later step is bit-equal to that of a run that was never interrupted.

    python tools/soak/power_cut.py [--cuts 20] [--engine fsdp|megatron] [--work FOLDER]

Needs root, losetup and mkfs.ext4. Exit status 1 when a copy does not come back, 77 where nothing can be mounted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import corpus, runs  # noqa: E402

SIZE_MB = 96
SKIPPED = 77


def mount(image: Path, target: Path) -> None:
    """Mount a file with a file system; raises CalledProcessError where that is impossible."""
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True, capture_output=True)


def unmount(target: Path) -> None:
    """Unmount, after what is still in use was closed."""
    subprocess.run(["umount", str(target)], check=True, capture_output=True)


def make_disk(image: Path) -> None:
    """An empty ext4 in a file."""
    with image.open("wb") as stream:
        stream.truncate(SIZE_MB * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)


def config_of(folder: Path, output_dir: Path, engine: str, steps: int) -> dict[str, Any]:
    """A short run that saves at every second step and keeps one checkpoint."""
    return runs.base(
        folder, output_dir=str(output_dir), mixer={"name": "odm", "reward_scale": 5.0}, warmup_step=1, update_step=1,
        update_times=-1, max_steps=steps, save_strategy="steps", save_steps=2, save_total_limit=1, engine=engine,
        per_device_train_batch_size=4,
    )  # fmt: skip


def steps_on(disk: Path) -> list[int]:
    """The steps of the checkpoints on a mounted copy."""
    return sorted(int(path.name.split("-")[1]) for path in (disk / "out").glob("checkpoint-*"))


def cut_and_resume(copy: Path, folder: Path, options: argparse.Namespace, expected: list[dict[str, Any]]) -> str | None:
    """Mount a copy and give the command again -> what is wrong, or None."""
    disk = copy.with_suffix(".mounted")
    mount(copy, disk)
    try:
        there = steps_on(disk)
        config = config_of(folder, disk / "out", options.engine, options.steps)
        ((status, stderr),) = runs.train_many(1, [config])
        rows = runs.rows(config) if status == 0 else []
    finally:
        unmount(disk)
    begun = re.search(r"continuing from \S*checkpoint-(\d+) at step", stderr)
    print(
        f"{copy.name}: checkpoints {there or 'none'}, {begun[0] if begun else 'begun anew'}, status {status}",
        flush=True,
    )
    if status != 0:
        return f"status {status}: {stderr.strip().splitlines()[-1]}"
    if there and begun is None:
        return f"no whole checkpoint among {there}"
    if "damaged" in stderr:
        return next(line for line in stderr.splitlines() if "damaged" in line)
    if rows != expected:
        return f"{sum(a != b for a, b in zip(rows, expected, strict=False))} of {len(rows)} steps differ"
    return None


def run_and_copy(image: Path, disk: Path, folder: Path, options: argparse.Namespace, seconds: float) -> list[Path]:
    """Start the run on the disk and copy the disk's file at random moments, half of them while a checkpoint is written."""
    chosen, copies = random.Random(options.seed), []
    while len(copies) < options.cuts:
        shutil.rmtree(disk / "out", ignore_errors=True)
        processes = runs.start(config_of(folder, disk / "out", options.engine, options.steps), 1)
        while processes[0].is_alive() and len(copies) < options.cuts:
            if len(copies) % 2:
                _wait_for_a_save(disk, processes[0])
            else:
                time.sleep(chosen.uniform(0, 3 * seconds / options.cuts))
            copy = image.with_name(f"cut-{len(copies):02d}.img")
            if snapshot(image, copy, processes[0].pid):
                copies.append(copy)
        runs.finish(processes)
    return copies


def snapshot(image: Path, copy: Path, process: int) -> bool:
    """Copy the disk's file, again until nothing was written meanwhile -> whether the run was alive."""
    try:
        os.kill(process, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    while True:
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        if subprocess.run(["cmp", "-s", str(image), str(copy)], check=False).returncode == 0:
            break
    os.kill(process, signal.SIGCONT)
    return True


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _wait_for_a_save(disk: Path, process: Any) -> None:
    """Until the temporary folder of a checkpoint appears or goes."""
    before = _names(disk / "out")
    deadline = time.monotonic() + 20
    while process.is_alive() and time.monotonic() < deadline:
        if any("checkpoint" in name for name in _names(disk / "out") ^ before):
            return
        time.sleep(0.0005)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 when every copy came back bit-equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--engine", default="fsdp", choices=("fsdp", "megatron"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder to work in; default: a temporary one")
    options = parser.parse_args(argv)
    work = options.work or Path(tempfile.mkdtemp(prefix="power-cut-"))
    work.mkdir(parents=True, exist_ok=True)
    image, disk = work / "disk.img", work / "disk"
    try:
        make_disk(image)
        mount(image, disk)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"skipped: no loop device can be mounted here: {error}")
        return SKIPPED
    try:
        folder = corpus.write(work / "corpus")
        plain = config_of(folder, work / "plain", options.engine, options.steps)
        started = time.monotonic()
        ((status, stderr),) = runs.train_many(1, [plain])
        assert status == 0, stderr
        expected = json.loads(json.dumps(runs.rows(plain)))
        copies = run_and_copy(image, disk, folder, options, time.monotonic() - started)
    finally:
        unmount(disk)
    faults = {copy.name: cut_and_resume(copy, folder, options, expected) for copy in copies}
    for name, fault in faults.items():
        if fault:
            print(f"{name}: {fault}")
    wrong = sum(fault is not None for fault in faults.values())
    print(f"{len(copies)} power cuts, {len(copies) - wrong} came back bit-equal")
    if not options.work:
        shutil.rmtree(work)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
