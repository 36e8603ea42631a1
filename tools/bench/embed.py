"""Memory and speed of the offline tools, for more and more samples: embeddings block by block, and an exact search.

The encoder is a random projection of characters, so what is measured is the tool around it. Each size runs in a process of
its own; `private` is the largest anonymous memory of that process beyond what it had when it began (mapped files, which the
system can drop at any time, are not counted).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dataflex_mega.distributed.mesh import data_parallel
from dataflex_mega.offline.embed import embed
from dataflex_mega.offline.encoders import Item
from dataflex_mega.offline.neighbours import Search

EXAMPLE = """
examples:
  python tools/bench/embed.py                              # 20 thousand to 500 thousand samples, half a minute
  python tools/bench/embed.py --samples 1e6 5e6 --size 384

columns:
  samples     N
  embed/s     samples a second, encoder and disk included
  private     MiB: the peak of embedding
  search s    seconds of an exact search of the nearest 100 for 64 queries
  private     MiB: its peak
  file MiB    what the embeddings take on disk
"""


class Texts:
    """N texts that are made when they are asked for."""

    identity = {"file": "bench"}

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: np.ndarray) -> list[Item]:
        return [Item(f"sample {row} of the bench, a text of some length") for row in rows]


class Projection:
    """Counts of characters, projected."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.matrix = np.random.default_rng(0).normal(size=(128, size)).astype(np.float32)

    def identity(self) -> dict[str, str]:
        return {"model": "projection"}

    def __call__(self, items: list[Item]) -> np.ndarray:
        counts = np.zeros((len(items), 128), dtype=np.float32)
        for row, item in enumerate(items):
            np.add.at(counts[row], np.frombuffer(item.text.encode(), dtype=np.uint8) % 128, 1)
        return counts @ self.matrix


class Peak:
    """The largest private memory of this process while it is entered, in MiB beyond that at the start."""

    def __enter__(self) -> Peak:
        self.begin, self.most, self.stop = private(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.started = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, private() - self.begin)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.stop.set()
        self.thread.join()


def private() -> float:
    """MiB of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(samples: int, size: int, queue: multiprocessing.SimpleQueue) -> None:
    """One line of the table, put into `queue`."""
    mesh = data_parallel(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        with Peak() as writing:
            embed(Texts(samples), Projection(size), Path(name), mesh, "float32", 1024, lambda done, total: None)
        values = np.load(Path(name) / "embeddings.npy", mmap_mode="r")
        with Peak() as searching:
            Search()(values, np.asarray(values[:64]), 100)
        queue.put((samples / writing.seconds, writing.most, searching.seconds, searching.most, values.nbytes / 2**20))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", type=float, default=[2e4, 1e5, 5e5], help="numbers of samples")
    parser.add_argument("--size", type=int, default=256, help="numbers a vector (256)")
    options = parser.parse_args()
    print(f"{'samples':>9} {'embed/s':>9} {'private':>8} {'search s':>9} {'private':>8} {'file MiB':>9}")
    context = multiprocessing.get_context("spawn")
    for samples in options.samples:
        queue = context.SimpleQueue()
        process = context.Process(target=measure, args=(int(samples), options.size, queue))
        process.start()
        process.join()
        if process.exitcode:
            return 1
        speed, writing, seconds, searching, disk = queue.get()
        print(f"{samples:9.0f} {speed:9.0f} {writing:8.0f} {seconds:9.2f} {searching:8.0f} {disk:9.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
