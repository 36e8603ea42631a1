"""What each mixer costs against fixed proportions, as paired ratios in one process.

Trainers of one model take their steps in turn, in an order that changes each round, so that whatever else the machine does
falls on all alike. A ratio to `static` is taken within each round; the median over rounds is printed with its quartiles.
Every mixer re-plans at every step, the most there is. A fit of ado is timed by itself.

    python tools/bench/mixers.py --rounds 60

doremi, doge and dynamic_moe need a reference, backward passes or experts; docs/mixing.md says what they cost.
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

    overhead = support("tools/bench/overhead")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, roles in MIXERS.items():
            keys = overhead.keys_of(options, Path(folder) / name)
            if options.corpus:
                keys = {k: v for k, v in keys.items() if k not in ("dataset", "dataset_dir")}
                keys["corpus_dir"] = options.corpus
            trainers[name] = overhead.our_trainer(keys, roles)
        for trainer, state in trainers.values():
            for _ in range(3):
                trainer.advance(state)
        order, ratios, base = list(trainers), {name: [] for name in trainers if name != "static"}, []
        for number in range(options.rounds):
            random.Random(number).shuffle(order)
            spent = {name: overhead.lap(lambda t=trainers[name]: t[0].advance(t[1])) for name in order}
            base.append(spent["static"])
            for name, values in ratios.items():
                values.append(spent[name] / spent["static"])
        overhead.show(f"a step / a step of static, {options.rounds} rounds", ratios, 1.01)
    step = statistics.median(base)
    fit = min(fit_seconds(7, 256) for _ in range(3))
    print(f"\nstatic: {step * 1e3:.1f} ms a step")
    print(
        f"a fit of ado, 7 domains, 256 points: {fit:.3f} s; spread over 1000 steps {fit / 1000 / step:.4%} of such a step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
