"""Cost of a gradient store as samples and processes grow: work, gathered bytes, memory, speed of writing.

Rows are synthetic, so that a million of them are quick to generate; only the store is measured, not the model. Every
rank scores its share against 16 directions, gathers the scores of all candidates (which a selector chooses from) and
finds the best 1000 (which `dataflex-cli store score` prints).
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dataflex_mega.distributed.testing import run_distributed_test
from dataflex_mega.store import build, search
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout

EXAMPLE = """
examples:
  python tools/bench/store.py                              # 1e3 .. 1e6 samples, 1, 2 and 4 processes
  python tools/bench/store.py --samples 1e5 --width 4096   # rows as long as those of a real model

columns:
  samples, ranks
  rows/rank    rows that the busiest rank read; N/D up to a block
  cpu s/rank   processor time of the busiest rank for its products, checksums and ranking
  scores       bytes that all ranks together send, a candidate, so that each has all scores
  best         the same for the best 1000 alone: 16 for each that a rank offers
  extra MiB    growth of the busiest rank's own memory (anonymous pages; mapped files are not counted)
  open ms      to open the store, whatever its size
  write        speed of writing the store, relative to writing the same bytes into one file (the budget is 0.8)
"""
DIRECTIONS, BEST = 16, 1000


class CountingCollectives:
    """Collectives that count the bytes a rank sends."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sent = inner, 0

    def all_gather_uneven(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        self.sent += rows.numel() * rows.element_size()
        return self.inner.all_gather_uneven(rows, counts)


def anonymous_mib() -> float:
    """MiB of this process's memory now, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def write(folder: Path, layout: StoreLayout) -> float:
    """Write a store of random rows -> seconds of writing, with checksums and flushing."""
    generator, spent = torch.Generator().manual_seed(0), 0.0
    begin = time.perf_counter()
    build.create_or_resume(folder, {"synthetic": True}, layout)
    spent += time.perf_counter() - begin
    rows = torch.randn(layout.block_size, layout.width, generator=generator).bfloat16()
    for shard in range(layout.num_shards):
        begin = time.perf_counter()
        writer = build.ShardWriter(folder, layout, shard)
        for block in writer.missing_blocks:
            writer.write(rows[: len(layout.ids_of_block(block))].roll(block, 1))
        writer.close()
        spent += time.perf_counter() - begin
    begin = time.perf_counter()
    build.finalize(folder, {"synthetic": True}, layout)
    return spent + time.perf_counter() - begin


def plain_write(path: Path, layout: StoreLayout) -> float:
    """Seconds to write as many bytes, in the same pieces, into one file, and to flush it."""
    rows = torch.randn(layout.block_size, layout.width).bfloat16()
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        for block in range(layout.num_blocks):
            block_rows = rows[: len(layout.ids_of_block(block))].roll(block, 1)
            stream.write(block_rows.contiguous().view(torch.int16).numpy().data)
        os.fsync(stream.fileno())
    return time.perf_counter() - begin


def score_store(parallel_info: Any, folder: Path) -> dict[str, float]:
    """Score the store on one rank -> its work, time, memory and bytes, by name."""
    from dataflex_mega.distributed.collectives import TorchCollectives

    collectives: Any = CountingCollectives(TorchCollectives(parallel_info))
    rank, world = parallel_info.dp_rank, parallel_info.dp_size
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # what the first product sets up is not the store's
    begin = time.perf_counter()
    store = GradientStore(folder)
    opened = time.perf_counter() - begin
    directions = torch.randn(DIRECTIONS, store.layout.width, generator=torch.Generator().manual_seed(1))
    before, cpu = anonymous_mib(), time.process_time()
    scores = search.streamed_max_cosine(store, directions, rank, world)
    spent = time.process_time() - cpu
    counts = search.rank_counts(store, world)
    everyone = collectives.all_gather_uneven(scores, counts)
    for_all, collectives.sent = collectives.sent, 0
    search.top_k(scores, rank, counts, min(BEST, len(everyone)), collectives)
    return {
        "rows": counts[rank], "cpu": spent, "for all": for_all, "best": collectives.sent, "open": opened,
        "memory": anonymous_mib() - before,
    }  # fmt: skip


def row(samples: int, width: int, world: int, root: Path) -> str:
    """Build and score a store -> a line of the table."""
    layout = StoreLayout(samples, width, world)
    folder = root / f"{samples}-{world}"
    plain = min(plain_write(root / "plain", layout) for _ in range(3))
    build_times = [write(root / f"{samples}-{world}-{i}", layout) for i in range(3)]
    (root / f"{samples}-{world}-0").rename(folder)
    results = run_distributed_test(score_store, world, folder)
    sent, best = (sum(result[name] for result in results) / samples for name in ("for all", "best"))
    largest = {name: max(result[name] for result in results) for name in results[0]}
    size = f"{samples:9d} {world:6d} {int(largest['rows']):10d}"
    return (
        f"{size} {largest['cpu']:11.3f} {sent:6.2f} {best:6.2f} {largest['memory']:10.1f} "
        f"{largest['open'] * 1e3:8.2f} {plain / min(build_times):7.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", type=float, default=[1e3, 1e4, 1e5, 1e6])
    parser.add_argument("--width", type=int, default=256, help="numbers per sample (default 256)")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, help="where stores are written (default: a temporary folder)")
    options = parser.parse_args()
    if min(options.samples) < 1 or options.width < 1 or min(options.ranks) < 1:
        parser.error("samples, width and ranks are at least 1")
    print(f"{options.width} numbers per sample, {DIRECTIONS} directions, best {BEST}; {mp.cpu_count()} cores")
    head = ("samples", "ranks", "rows/rank", "cpu s/rank", "scores", "best", "extra MiB", "open ms", "write")
    print("{:>9} {:>6} {:>10} {:>11} {:>6} {:>6} {:>10} {:>8} {:>7}".format(*head))
    for samples in options.samples:
        for world in options.ranks:
            with tempfile.TemporaryDirectory(dir=options.folder) as root:
                print(row(int(samples), options.width, world, Path(root)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
