"""Cost of each mixer against fixed proportions, as paired ratios in one process.

Trainers of one model take their steps in turn, in an order that changes each round, so that other load of the machine
affects all of them equally. A ratio to `static` is taken within each round; the median over rounds is printed with its
quartiles. On a noisy machine these cannot resolve one per cent, so the time around the engine's own step is printed
separately. Every mixer re-plans at every step, the largest possible cost. A fit of ado is timed separately. Then the
mixers that need more: dynamic_moe against static on a mixture of experts; doremi's proxy step with existing reference
losses, and the pass that computes them; an update of doge with its backward passes.

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


def load_tool(name: str) -> ModuleType:
    """A module of tests/ or tools/ by path."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), ROOT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fit_seconds(domains: int, points: int) -> float:
    """Seconds of one fit of ado."""
    import torch

    from dataflex_mega.algorithms.mixers.ado import fit

    generator = torch.Generator().manual_seed(0)
    n = torch.linspace(1e4, 1e6, points, dtype=torch.float64).expand(domains, points).contiguous()
    noise = 1 + 0.01 * torch.randn(domains, points, generator=generator, dtype=torch.float64)
    losses = (0.8 + 3.0 * torch.rand(domains, 1, generator=generator, dtype=torch.float64)).exp() * n**-0.3 + 2.0
    start = time.perf_counter()
    fit(n, losses * noise, torch.full_like(n, 1.0), 0.5)
    return time.perf_counter() - start


def main() -> int:
    """Compare all mixers and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each mixer (60)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample (256)")
    parser.add_argument("--model", type=Path, help="another model's folder")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--corpus", help="train on this corpus in place of the demo's data")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if options.corpus is None and not (options.demo / "moe").is_dir():
        parser.error(f"{options.demo}/moe not found; make demo-corpus")
    with tempfile.TemporaryDirectory() as folder:
        step = compare_free(options, Path(folder))
        if options.corpus is None:
            moe = argparse.Namespace(**{**vars(options), "model": options.demo / "moe"})
            compare_rounds(make_trainers(moe, MOE, Path(folder) / "moe"), options.rounds, "the same with experts")
            compare_doremi(options, Path(folder) / "doremi")
            compare_doge(options, Path(folder) / "doge", step)
    return 0


def make_trainers(options: argparse.Namespace, mixers: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Name -> (trainer, state), warmed up."""
    overhead, trainers = load_tool("tools/bench/overhead"), {}
    for name, roles in mixers.items():
        keys = overhead.keys_of(options, folder / name)
        if options.corpus:
            keys = {k: v for k, v in keys.items() if k not in ("dataset", "dataset_dir")}
            keys["corpus_dir"] = options.corpus
        trainers[name] = overhead.our_trainer(
            {**keys, **roles.get("keys", {})}, {k: v for k, v in roles.items() if k != "keys"}
        )
        trainers[name][0].engine = TimedEngine(trainers[name][0].engine)
        for _ in range(3):
            trainers[name][0].step(trainers[name][1])
    return trainers


class TimedEngine:
    """An engine that adds up the seconds of its steps."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_step(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        stats = self.engine.train_step(*arguments)
        self.seconds += time.perf_counter() - start
        return stats


def compare_rounds(trainers: dict[str, Any], count: int, title: str) -> float:
    """Print the ratios to static -> the median seconds of a step of static."""
    overhead = load_tool("tools/bench/overhead")
    order, ratios, static_seconds = list(trainers), {name: [] for name in trainers if name != "static"}, []
    around: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(count):
        random.Random(number).shuffle(order)
        spent = {}
        for name in order:
            trainer, state = trainers[name]
            before = trainer.engine.seconds
            spent[name] = overhead.time_call(lambda t=trainer, s=state: t.step(s))
            around[name].append(spent[name] - (trainer.engine.seconds - before))
        static_seconds.append(spent["static"])
        for name, values in ratios.items():
            values.append(spent[name] / spent["static"])
    overhead.show(f"a step / a step of static, {title}, {count} rounds", ratios, 1.01)
    step, plain = statistics.median(static_seconds), statistics.median(around["static"])
    print(f"static: {step * 1e3:.1f} ms per step, {plain * 1e3:.2f} ms of it around the engine: planning, data, log")
    for name in ratios:
        print(f"{name:22}{(statistics.median(around[name]) - plain) / step:9.2%} of a step more around the engine")
    print(flush=True)
    return step


def compare_free(options: argparse.Namespace, folder: Path) -> float:
    """Compare the mixers that need no extra passes -> seconds of a step of static."""
    step = compare_rounds(make_trainers(options, MIXERS, folder), options.rounds, "re-planned at every step")
    fit = min(fit_seconds(7, 256) for _ in range(3))
    print(f"a fit of ado, 7 domains, 256 points: {fit:.3f} s; over 1000 steps {fit / 1000 / step:.4%} of such a step")
    return step


def compare_doremi(options: argparse.Namespace, folder: Path) -> None:
    """Compare doremi's proxy step with a step of static, and a token of the reference pass with one of training."""
    from dataflex_mega.run import reference

    passes: list[float] = []
    build = reference.build

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        build(*arguments)
        passes.append(time.perf_counter() - start)

    rows = {"max_samples": REFERENCE_ROWS}
    source = str(options.model or options.demo / "model")
    mixers = {
        "static": {"mixer": "static", "keys": rows},
        "again": {"mixer": "static", "keys": rows},
        "doremi": {"mixer": "doremi", "reference_model": source, **MOVING, "keys": rows},
    }
    with mock.patch.object(reference, "build", timed):
        trainers = make_trainers(options, mixers, folder)
    step = compare_rounds(trainers, options.rounds, "doremi's proxy with reference losses on disk")
    pool = trainers["doremi"][0].loader.pool
    tokens = sum(len(inputs) for d in pool.domains for inputs, _ in d.rows.fetch(np.arange(len(d.rows))))
    ratio = passes[0] / tokens / (step / (options.batch * options.length))
    print(f"reference pass: {tokens:,} tokens, {ratio:.2f} of the time that training on as many takes")


def compare_doge(options: argparse.Namespace, folder: Path, step: float) -> None:
    """Compare an update of doge with a step of static."""
    mixers = {"doge": {"mixer": {"name": "doge", "probe_samples": PROBE}, "update_step": 20, "update_times": -1}}
    ((trainer, state),) = make_trainers(options, mixers, folder).values()
    overhead = load_tool("tools/bench/overhead")
    state.step = 20
    spent = statistics.median(overhead.time_call(lambda: trainer.controller.next_plan(state)) for _ in range(5))
    samples = PROBE * len(trainer.controller.domains.names)
    print(
        f"\nan update of doge: {spent / step:.1f} steps of static for {samples} samples, as many as "
        f"{samples / options.batch:.0f} steps train on; every 100 steps {spent / step / 100:.1%} more"
    )


if __name__ == "__main__":
    sys.exit(main())
