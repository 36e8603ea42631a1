"""What each mixer costs against fixed proportions, as paired ratios in one process.

Trainers of one model take their steps in turn, in an order that changes each round, so that whatever else the machine does
falls on all alike. A ratio to `static` is taken within each round; the median over rounds is printed with its quartiles. On
a noisy machine they say little of a per cent, so what a step spends around the engine's own step is printed by itself.
Every mixer re-plans at every step, the most there is. A fit of ado is timed by itself. Then those that need more:
dynamic_moe against static on a mixture of experts; doremi's proxy step with reference losses that are there, and the pass
that makes them; an update of doge with its backward passes.

    make demo-corpus && python tools/bench/mixers.py --rounds 60
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NEVER = 10**9
MOVING = {"update_step": 1, "update_times": -1}
MIXERS: dict[str, dict[str, Any]] = {
    "static": {"mixer": "static"},
    "again": {"mixer": "static"},  # the noise of the measurement
    "random": {"mixer": "random", **MOVING},
    "odm": {"mixer": "odm", **MOVING},
    "group_dro": {"mixer": "group_dro", **MOVING},
    "ado": {"mixer": {"name": "ado", "start_step": 1, "ignore_steps": 0, "refit_every": NEVER}, **MOVING},
}
MOE: dict[str, dict[str, Any]] = {
    "static": {"mixer": "static"},
    "again": {"mixer": "static"},
    "dynamic_moe": {"mixer": {"name": "dynamic_moe", "count_steps": 1}, **MOVING},
}
PROBE = 64  # samples of a domain in an update of doge
REFERENCE_ROWS = 200  # of each domain, that the reference pass is timed on


def support(name: str) -> ModuleType:
    """A module of tests/ or tools/ by path."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fit_seconds(domains: int, points: int) -> float:
    """Of one fit of ado."""
    import torch

    from dataflex_mega.algorithms.mixers.ado import fit

    made = torch.Generator().manual_seed(0)
    n = torch.linspace(1e4, 1e6, points, dtype=torch.float64).expand(domains, points).contiguous()
    noise = 1 + 0.01 * torch.randn(domains, points, generator=made, dtype=torch.float64)
    losses = (0.8 + 3.0 * torch.rand(domains, 1, generator=made, dtype=torch.float64)).exp() * n**-0.3 + 2.0
    start = time.perf_counter()
    fit(n, losses * noise, torch.full_like(n, 1.0), 0.5)
    return time.perf_counter() - start


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each mixer (60)")
    parser.add_argument("--batch", type=int, default=8, help="samples a step (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sample (256)")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--corpus", help="train on this corpus in place of the demo's data")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if options.corpus is None and not (options.demo / "moe").is_dir():
        parser.error(f"{options.demo}/moe not found; make demo-corpus")
    with tempfile.TemporaryDirectory() as folder:
        step = free(options, Path(folder))
        if options.corpus is None:
            moe = argparse.Namespace(**{**vars(options), "model": options.demo / "moe"})
            rounds(make(moe, MOE, Path(folder) / "moe"), options.rounds, "the same with experts")
            doremi(options, Path(folder) / "doremi")
            doge(options, Path(folder) / "doge", step)
    return 0


def make(options: argparse.Namespace, mixers: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Name -> (trainer, state), warmed up."""
    overhead, made = support("tools/bench/overhead"), {}
    for name, roles in mixers.items():
        keys = overhead.keys_of(options, folder / name)
        if options.corpus:
            keys = {k: v for k, v in keys.items() if k not in ("dataset", "dataset_dir")}
            keys["corpus_dir"] = options.corpus
        made[name] = overhead.our_trainer(
            {**keys, **roles.get("keys", {})}, {k: v for k, v in roles.items() if k != "keys"}
        )
        made[name][0].engine = Timed(made[name][0].engine)
        for _ in range(3):
            made[name][0].advance(made[name][1])
    return made


class Timed:
    """An engine that adds up the seconds of its steps."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_step(self, *given: Any) -> Any:
        start = time.perf_counter()
        stats = self.engine.train_step(*given)
        self.seconds += time.perf_counter() - start
        return stats


def rounds(made: dict[str, Any], count: int, title: str) -> float:
    """Print the ratios to the first -> seconds of a step of it, the median."""
    overhead = support("tools/bench/overhead")
    order, ratios, whole = list(made), {name: [] for name in made if name != "static"}, []
    around: dict[str, list[float]] = {name: [] for name in made}
    for number in range(count):
        random.Random(number).shuffle(order)
        spent = {}
        for name in order:
            trainer, state = made[name]
            before = trainer.engine.seconds
            spent[name] = overhead.lap(lambda t=trainer, s=state: t.advance(s))
            around[name].append(spent[name] - (trainer.engine.seconds - before))
        whole.append(spent["static"])
        for name, values in ratios.items():
            values.append(spent[name] / spent["static"])
    overhead.show(f"a step / a step of static, {title}, {count} rounds", ratios, 1.01)
    step, plain = statistics.median(whole), statistics.median(around["static"])
    print(f"static: {step * 1e3:.1f} ms a step, {plain * 1e3:.2f} ms of it around the engine: planning, data, log")
    for name in ratios:
        print(f"{name:22}{(statistics.median(around[name]) - plain) / step:9.2%} of a step more around the engine")
    print(flush=True)
    return step


def free(options: argparse.Namespace, folder: Path) -> float:
    """The mixers that cost nothing but their arithmetic -> seconds of a step of static."""
    step = rounds(make(options, MIXERS, folder), options.rounds, "re-planned at every step")
    fit = min(fit_seconds(7, 256) for _ in range(3))
    print(f"a fit of ado, 7 domains, 256 points: {fit:.3f} s; over 1000 steps {fit / 1000 / step:.4%} of such a step")
    return step


def doremi(options: argparse.Namespace, folder: Path) -> None:
    """Its proxy's step against static's, and a token of the reference pass against one of training."""
    from dataflex_mega.run import reference

    passes: list[float] = []
    build = reference.build

    def timed(*given: Any) -> None:
        start = time.perf_counter()
        build(*given)
        passes.append(time.perf_counter() - start)

    rows = {"max_samples": REFERENCE_ROWS}
    source = str(options.model or options.demo / "model")
    mixers = {
        "static": {"mixer": "static", "keys": rows},
        "again": {"mixer": "static", "keys": rows},
        "doremi": {"mixer": "doremi", "reference_model": source, **MOVING, "keys": rows},
    }
    with mock.patch.object(reference, "build", timed):
        made = make(options, mixers, folder)
    step = rounds(made, options.rounds, "doremi's proxy with reference losses on disk")
    pool = made["doremi"][0].loader.pool
    tokens = sum(len(inputs) for d in pool.domains for inputs, _ in d.rows.fetch(np.arange(len(d.rows))))
    ratio = passes[0] / tokens / (step / (options.batch * options.length))
    print(f"reference pass: {tokens:,} tokens, {ratio:.2f} of the time that training on as many takes")


def doge(options: argparse.Namespace, folder: Path, step: float) -> None:
    """An update against a step of static."""
    mixers = {"doge": {"mixer": {"name": "doge", "probe_samples": PROBE}, "update_step": 20, "update_times": -1}}
    ((trainer, state),) = make(options, mixers, folder).values()
    overhead = support("tools/bench/overhead")
    state.step = 20
    spent = statistics.median(overhead.lap(lambda: trainer.controller.next_plan(state)) for _ in range(5))
    samples = PROBE * len(trainer.controller.domains.names)
    print(
        f"\nan update of doge: {spent / step:.1f} steps of static for {samples} samples, as many as "
        f"{samples / options.batch:.0f} steps train on; every 100 steps {spent / step / 100:.1%} more"
    )


if __name__ == "__main__":
    sys.exit(main())
