"""What a save costs that is flushed to the disk, and what verification costs at a resume, as ratios.

A save of the whole loop is timed with and without fsync, in turns in one process, on state of about the size that is asked
for. The budget is 1.2: hashes and flushes run at the same time. Verification is compared with reading the same files once.

    python tools/bench/durability.py [--mb 256] [--rounds 5] [--folder FOLDER]

Exit status 1 over the budget.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dataflex_mega import checkpoint, types  # noqa: E402

BUDGET = 1.2


class OneProcess:
    """Collectives of one process."""

    parallel_info = SimpleNamespace(rank=0, world_size=1, is_main=True)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The value of the one process."""
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        """The value of the one process."""
        return value


class Tensors:
    """An engine with so many megabytes of state in four files."""

    def __init__(self, megabytes: int) -> None:
        self.parts = [torch.randn(megabytes * 2**20 // 16) for _ in range(4)]

    def save_state(self, folder: Path) -> None:
        """Write the files, as the shards of four ranks."""
        for number, part in enumerate(self.parts):
            save_file({"part": part}, folder / f"__{number}_0.safetensors")

    def load_state(self, folder: Path) -> None:
        """Read the files."""
        self.parts = [load_file(path)["part"] for path in sorted(folder.iterdir())]

    def rng_state(self) -> dict[str, Any]:
        """The generator of the CPU."""
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Nothing to set."""


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def read_all(folder: Path) -> None:
    """Read every file of a folder once."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                while stream.read(2**20):
                    pass


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    """Fewest seconds: a save with and without fsync, verification, reading."""
    engine, times = Tensors(megabytes), {"unsynced": [], "synced": [], "verify": [], "read": []}  # type: ignore[var-annotated]
    collectives: Any = OneProcess()
    saver = checkpoint.Checkpointer(folder, collectives, {"global_batch_size": 1}, save_total_limit=1)
    step = 0
    for _ in range(rounds + 1):
        for kind in ("unsynced", "synced"):
            os.sync()  # what the save before left is not this one's
            step += 1
            plan = types.SamplingPlan(step, (1.0,), (0,), (0.0,))
            state = types.TrainState(step, plan)
            with mock.patch.object(os, "fsync", lambda _: None) if kind == "unsynced" else nullcontext():
                times[kind].append(seconds(lambda state=state: saver.save(state, engine, {})))
        path = folder / f"checkpoint-{step}"
        times["read"].append(seconds(lambda path=path: read_all(path)))
        times["verify"].append(seconds(lambda path=path: saver.verify(path)))
    return {kind: min(values[1:]) for kind, values in times.items()}  # the first round warms up


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 when a save costs more than the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="durability-", dir=options.folder))
    try:
        found = measure(folder, options.mb, options.rounds)
    finally:
        shutil.rmtree(folder)
    ratio = found["synced"] / found["unsynced"]
    print(f"{options.mb} MB: a save {found['synced']:.3f} s, without fsync {found['unsynced']:.3f} s: {ratio:.2f} x")
    print(f"verification {found['verify']:.3f} s, {found['verify'] / found['read']:.2f} x reading the files once")
    return 1 if ratio > BUDGET else 0


if __name__ == "__main__":
    sys.exit(main())
