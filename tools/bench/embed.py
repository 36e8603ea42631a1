"""Memory and speed of the offline tools as the number of samples grows: `embed`, `near` (exact and inverted file),
`tsds`.

The encoder is a random projection of characters, so the measurement is of the tool around it. Every tool and size runs
in a process of its own; MiB is the largest anonymous memory of that process beyond its initial one (mapped files, which
the system can drop at any time, are not counted).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from dataflex_mega.distributed.parallel_info import data_parallel
from dataflex_mega.offline import command
from dataflex_mega.offline.embed import embed
from dataflex_mega.offline.encoders import EmbedInput
from dataflex_mega.offline.neighbours import import_faiss

EXAMPLE = """
examples:
  python tools/bench/embed.py                              # 50 and 200 thousand samples, a minute
  python tools/bench/embed.py --samples 1e6 4e6 --size 384

columns: N, then seconds and MiB of
  embed   all N samples, encoder and disk included
  exact   the nearest 100 of 64 queries, all candidates compared
  ivf     the same by an inverted file
  tsds    probabilities from the nearest 200 of these queries, with their kernel densities
and the MiB that the embeddings take on disk
"""
SEARCH = ["--queries", "queries.npy", "--candidates"]
TOOLS = {
    "embed": [],
    "exact": ["near", "--k", "100", *SEARCH],
    "ivf": ["near", "--k", "100", "--index", "ivf", *SEARCH],
    "tsds": ["tsds", "--k", "200", "--kde-k", "100", *SEARCH],
}


class Texts:
    """N texts, generated on request."""

    identity = {"file": "bench"}

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: np.ndarray) -> list[EmbedInput]:
        return [EmbedInput(f"sample {row} of the bench, a text of some length") for row in rows]


class Projection:
    """An encoder: random projections of character counts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.matrix = np.random.default_rng(0).normal(size=(128, size)).astype(np.float32)

    def identity(self) -> dict[str, str]:
        return {"model": "projection"}

    def __call__(self, inputs: Sequence[EmbedInput]) -> np.ndarray:
        counts = np.zeros((len(inputs), 128), dtype=np.float32)
        for row, item in enumerate(inputs):
            np.add.at(counts[row], np.frombuffer(item.text.encode(), dtype=np.uint8) % 128, 1)
        return counts @ self.matrix


def anonymous_mib(process: int) -> float:
    """MiB of anonymous memory of a process."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def work(tool: str, samples: int, size: int, folder: Path, reports: multiprocessing.SimpleQueue, go: Any) -> None:
    """Run one tool on the embeddings in `folder`, which `embed` writes. Reports that it waits for `go`, then its seconds."""
    os.chdir(folder)
    import_faiss()  # not while it is measured
    reports.put(0.0)
    go.wait()
    started = time.perf_counter()
    if tool == "embed":
        parallel_info = data_parallel(0, 1, torch.device("cpu"))
        embed(
            Texts(samples), Projection(size), folder / "all", parallel_info, "float32", 1024, lambda done, total: None
        )
    else:
        with contextlib.redirect_stderr(io.StringIO()):
            command.main([*TOOLS[tool], "all", "--output", f"{tool}.npy"], no_run)
    reports.put(time.perf_counter() - started)
    if tool == "embed":
        np.save("queries.npy", Projection(size)(Texts(samples).fetch(np.arange(64))))


def measure(tool: str, samples: int, size: int, folder: Path) -> tuple[float, float]:
    """(seconds, MiB), watched from this process, since a working library may block all threads of its own."""
    context = multiprocessing.get_context("spawn")
    reports, go = context.SimpleQueue(), context.Event()
    process = context.Process(target=work, args=(tool, samples, size, folder, reports, go))
    process.start()
    most = begin = reports.get() + anonymous_mib(process.pid or 0)
    go.set()
    while reports.empty() and process.is_alive():
        most = max(most, anonymous_mib(process.pid or 0))
        time.sleep(0.001)
    seconds = reports.get()
    process.join()
    return seconds, most - begin


def no_run(path: Path, part: str, overrides: Sequence[str]) -> NoReturn:
    """Replaces opening a configuration, which no tool here does."""
    raise NotImplementedError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", type=float, default=[5e4, 2e5], help="numbers of samples")
    parser.add_argument("--size", type=int, default=256, help="numbers per vector (256)")
    options = parser.parse_args()
    print(f"{'samples':>9}" + "".join(f" {tool:>8} s {'MiB':>6}" for tool in TOOLS) + f" {'file MiB':>9}")
    for samples in map(int, options.samples):
        print(f"{samples:9d}", end="", flush=True)
        with tempfile.TemporaryDirectory() as name:
            for tool in TOOLS:
                seconds, most = measure(tool, samples, options.size, Path(name))
                print(f" {seconds:10.2f} {most:6.0f}", end="", flush=True)
            print(f" {(Path(name) / 'all' / 'embeddings.npy').stat().st_size / 2**20:9.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
