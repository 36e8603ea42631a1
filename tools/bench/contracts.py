"""Cost of the checks of algorithms per step: a step with them against the same step without.

One trainer with a mixer that updates at every step and a weighter takes its steps in pairs, one with the weights checked and
one without, in an order that changes from pair to pair, so that other load of the machine affects both alike. The median of
the ratios is printed with its quartiles, and beside it, as it hardly depends on other load, the time of the checks alone
over that of a step. The budget is 1.01.

    make demo-data && python tools/bench/contracts.py --rounds 200
    torchrun --nproc_per_node 2 tools/bench/contracts.py        # with the comparison among ranks
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from overhead import ROOT, keys_of, our_trainer, show, time_call

ROLES = {"mixer": "odm", "update_step": 1, "update_times": -1, "weighter": "loss"}


class Unchecked:
    """What CheckedWeighter stands for, without its checks."""

    def __init__(self, weighter: Any) -> None:
        self.weighter = weighter

    def reduce(self, samples: Any) -> Any:
        return self.weighter.reduce(samples)

    def weights(self, samples: Any, step: int, total_steps: int) -> Any:
        return self.weighter.weights(samples, step, total_steps).to(samples.loss_sum)

    def end_step(self, step: int, last: bool) -> None:
        pass

    def check_values(self, step: int) -> None:
        pass


def seconds_of_checks(checked: Any, batch: int, calls: int = 500) -> float:
    """Seconds that the checks of a step of one micro-batch take, with the comparisons that fall into these steps."""
    import torch

    from dataflex_mega.types import SampleStats

    ids = torch.arange(batch)
    samples = SampleStats(ids, torch.zeros_like(ids), torch.rand(batch) + 1, torch.ones_like(ids))
    plain, spent = Unchecked(checked.weighter), []
    for one in (checked, plain):
        start = time.perf_counter()
        for step in range(calls):
            one.reduce(samples)
            one.weights(samples, step, calls)
            one.end_step(step, last=False)
        spent.append((time.perf_counter() - start) / calls)
    return spent[0] - spent[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--rounds", type=int, default=200, help="pairs of steps (200)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step and process (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample (256)")
    parser.add_argument("--model", type=Path, help="a folder with another config.json and tokenizer")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer, state = our_trainer(keys_of(options, Path(folder)), ROLES)
        controller = trainer.controller
        ways = {"checked": controller.weighter, "unchecked": Unchecked(controller.weighter.weighter)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 5):
            order = list(ways)
            random.Random(number).shuffle(order)
            for name in order:
                controller.weighter = ways[name]
                seconds[name].append(time_call(lambda: trainer.step(state)))
        alone = seconds_of_checks(ways["checked"], options.batch)
    if int(os.environ.get("RANK", "0")) == 0:
        pairs = list(zip(seconds["checked"], seconds["unchecked"], strict=True))[5:]
        step = statistics.median(plain for _, plain in pairs)
        print(
            f"a step without: {step * 1000:.2f} ms; its checks alone: {alone * 1e6:.0f} us, ratio {1 + alone / step:.4f}"
        )
        show("a step with checks / a step without", {"weights": [a / b for a, b in pairs]}, 1.01)
    return 0


if __name__ == "__main__":
    sys.exit(main())
