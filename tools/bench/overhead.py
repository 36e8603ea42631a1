"""Cost of the roles, and the loop against LLaMA-Factory's trainer, as paired ratios in one process.

First part: four trainers of one model and one data set - no role, ODM re-mixing at every step, loss weighting, both -
take their steps in turn, in an order that changes each round, so that other load of the machine affects all equally. A
ratio is taken within each round; the median over rounds is printed with its quartiles. The budget is 1.01.

Second part: rounds of a few steps of our loop without a role and of LLaMA-Factory's own trainer, in turn, on the same
model, data, batch size and optimizer. The budget is 1.00 (not slower).

    make demo-data && python tools/bench/overhead.py --rounds 60

On a GPU, `--model FOLDER --bf16 --roles none,mix+weight --no-peer` measures a larger model; tokens per second are
printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROLES: dict[str, dict[str, Any]] = {
    "none": {},
    "mix": {"mixer": "odm", "update_step": 1, "update_times": -1},
    "weight": {"weighter": "loss"},
    "mix+weight": {"mixer": "odm", "update_step": 1, "update_times": -1, "weighter": "loss"},
}


def keys_of(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """A pre-training run on the demo's four domains."""
    return {
        "model_name_or_path": str(options.model or options.demo / "model"),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "dataset_dir": str(options.demo / "data"),
        "dataset": "demo_c4,demo_wiki,demo_alpaca_text,demo_python",
        "cutoff_len": options.length,
        "finetuning_type": "full",
        "output_dir": str(output),
        "max_steps": 1_000_000,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1.0e-4,
        "bf16": options.bf16,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "disable_tqdm": True,
    }


def our_trainer(keys: dict[str, Any], roles: dict[str, Any]) -> tuple[Any, Any]:
    """(trainer, state) before the first step."""
    from dataclasses import replace

    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.control.controller import RoleSet
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import assemble, build_engine, prepare
    from dataflex_mega.types import TrainState

    ours = {"train_type": "dynamic", **roles} if roles else {"mixer": "static", "update_step": 1}
    run = prepare(parse_config({**keys, **ours, "tensorboard": False}, argument_types()))
    if not roles:  # the same loop with nothing in it
        run = replace(run, roles=replace(run.roles, algorithms=RoleSet()))
    trainer = assemble(run.session, run.roles, run.data, run.schedule, run.resume, build_engine(run))
    return trainer, TrainState(0, trainer.controller.initial_plan())


def time_call(work: Any) -> float:
    """Seconds of a call."""
    import torch

    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(title: str, ratios: dict[str, list[float]], budget: float) -> None:
    """Print a line for each ratio."""
    print(f"\n{title}\n{'':22}{'median':>9}{'quartiles':>20}{'budget':>9}")
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:22}{middle:9.4f}{f'{low:.4f} - {high:.4f}':>20}{budget:9.2f}")


def compare_roles(options: argparse.Namespace, folder: Path) -> None:
    """Print the cost of the roles: the first part."""
    trainers = {
        name: our_trainer(keys_of(options, folder / name.replace("+", "-")), r)
        for name, r in ROLES.items()
        if name in options.roles.split(",")
    }
    for trainer, state in trainers.values():
        for _ in range(3):
            trainer.step(state)
    seconds: list[float] = []
    order, ratios = list(trainers), {name: [] for name in trainers if name != "none"}
    for number in range(options.rounds):
        random.Random(number).shuffle(order)
        spent = {name: time_call(lambda t=trainers[name]: t[0].step(t[1])) for name in order}
        seconds.append(spent["none"])
        for name, values in ratios.items():
            values.append(spent[name] / spent["none"])
    tokens = options.batch * options.length
    print(
        f"no role: {statistics.median(seconds) * 1000:.1f} ms per step, {tokens / statistics.median(seconds):,.0f} tokens/s"
    )
    show(f"a step with the role / a step without, {options.rounds} rounds", ratios, 1.01)


class PeerSteps:
    """Durations of the peer's steps, from the end of one to the end of the next, without the first two."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def callback(self) -> Any:
        """A Hugging Face callback that fills `ends`."""
        from transformers import TrainerCallback

        laps = self

        class Note(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                laps.ends.append(time.perf_counter())

        return Note()

    def median(self) -> float:
        """The median seconds of a step."""
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[1:])


def peer_chunk(keys: dict[str, Any], steps: int) -> float:
    """Seconds of a step of LLaMA-Factory's own trainer."""
    from llamafactory.train.tuner import run_exp

    steps_of_peer = PeerSteps()
    with contextlib.redirect_stdout(io.StringIO()):
        run_exp(
            {**keys, "max_steps": steps, "report_to": "none", "overwrite_output_dir": True}, [steps_of_peer.callback()]
        )
    return steps_of_peer.median()


def compare_peer(options: argparse.Namespace, folder: Path) -> None:
    """Print the comparison with LLaMA-Factory's trainer: the second part."""
    from dataflex_mega.distributed.parallel_info import shutdown_distributed

    trainer, state = our_trainer(keys_of(options, folder / "ours"), {})
    shutdown_distributed(orderly=True)  # the peer runs without a process group, and with one process neither needs it
    keys, ratios = keys_of(options, folder / "peer"), []
    for _ in range(max(3, options.rounds // 10)):
        ours = statistics.median([time_call(lambda: trainer.step(state)) for _ in range(options.chunk)])
        ratios.append(ours / peer_chunk(keys, options.chunk + 2))
    show(f"our step / LLaMA-Factory's, {len(ratios)} rounds of {options.chunk} steps", {"no role": ratios}, 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo", help="folder with data/ and model/ (.demo)")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of the first part; a tenth for the second (60)")
    parser.add_argument("--chunk", type=int, default=12, help="steps in a round of the second part (12)")
    parser.add_argument("--batch", type=int, default=8, help="samples per step (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sample (256)")
    parser.add_argument("--model", type=Path, help="a folder with another config.json and tokenizer")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--roles", default=",".join(ROLES), help="which of them, `none` among them (all)")
    parser.add_argument("--no-peer", action="store_true", help="leave the second part out")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare_roles(options, Path(folder))
        if not options.no_peer:
            compare_peer(options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
