"""Speed and memory of the data order: ids per second of `Sampler.global_batch`, for pools of a million to a trillion
samples.

The order of a pool is computed, not stored, so neither speed nor memory may depend on the pool's size. For scale, the
last column compares with shuffling a million ids in memory by numpy.random.Generator.permutation, once per epoch of a
million: above 1 the sampler is faster.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
import tracemalloc

import numpy as np

from dataflex_mega.data.sampler import Sampler

PROPORTIONS = (0.541, 0.287, 0.042, 0.037, 0.034, 0.031, 0.028)  # seven uneven domains
EXAMPLE = """
examples:
  python tools/bench/sampler.py                       # the default pools and batch sizes
  python tools/bench/sampler.py --batch 512 --seconds 3
  python tools/bench/sampler.py --pool 1e6 1e13

columns:
  pool        samples of all seven domains together
  batch       samples of a global batch
  us/batch    microseconds of one global_batch call, the best of several rounds
  ids/s       ids per second on one core; the budget is 1e6
  extra MiB   largest memory allocated by Python and numpy while it runs, sampler included
  vs numpy    ids/s relative to Generator.permutation of a million ids
"""


def numpy_speed(seconds: float) -> float:
    """Ids per second of shuffling a million ids at a time, best round."""
    rng, best, end = np.random.default_rng(0), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        rng.permutation(1_000_000)
        best = max(best, 1_000_000 / (time.perf_counter() - begin))
    return best


def make_sampler(pool: int, batch: int) -> Sampler:
    sizes = [round(pool * proportion) for proportion in PROPORTIONS]
    return Sampler(sizes, batch, seed=0)


def sampler_speed(pool: int, batch: int, seconds: float) -> float:
    """Ids per second, best round of 64 steps."""
    sampler = make_sampler(pool, batch)
    plan, step, best = sampler.next_plan(None, 0, PROPORTIONS), 0, 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(64):
            sampler.global_batch(plan, step)
            step += 1
        best = max(best, 64 * batch / (time.perf_counter() - begin))
    return best


def extra_memory(pool: int, batch: int) -> float:
    """MiB, the peak over 200 steps."""
    gc.collect()
    tracemalloc.start()
    sampler = make_sampler(pool, batch)
    plan = sampler.next_plan(None, 0, PROPORTIONS)
    for step in range(200):
        sampler.global_batch(plan, step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", nargs="+", type=float, default=[1e6, 1e9, 1e12], help="samples of the pool")
    parser.add_argument("--batch", nargs="+", type=int, default=[512, 4096], help="samples of a global batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement (default 1)")
    options = parser.parse_args()
    if min(options.pool) < 1000 or max(options.pool) > 2**61 or min(options.batch) < 1 or options.seconds <= 0:
        parser.error("a pool has 1e3 .. 2e18 samples, a batch at least 1, and seconds are more than 0")
    reference = numpy_speed(options.seconds)
    print(f"numpy {np.__version__}, one thread; Generator.permutation(1000000): {reference:.3g} ids/s")
    print(f"{'pool':>8} {'batch':>6} {'us/batch':>9} {'ids/s':>9} {'extra MiB':>10} {'vs numpy':>9}")
    for pool in options.pool:
        for batch in options.batch:
            speed = sampler_speed(int(pool), batch, options.seconds)
            memory = extra_memory(int(pool), batch)
            row = f"{pool:8.0e} {batch:6d} {batch / speed * 1e6:9.1f} {speed:9.3g} {memory:10.2f}"
            print(f"{row} {speed / reference:9.3f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"largest resident size of this process, torch and numpy included: {peak:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
