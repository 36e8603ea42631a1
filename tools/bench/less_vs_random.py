"""Selecting with LESS toward a target against random selection: held-out loss of the target by seed, and cost.

Each setting has a pool of several sources and one or more targets. A target's file has three parts: rows that LESS
compares with, rows for measuring the result alone, and rows that are not used. All methods start from the same random
model and train the same number of steps; a method differs by its `selector` alone.

    make demo-data && python tools/bench/less_vs_random.py
    python tools/bench/less_vs_random.py --setting math=POOL.jsonl,MATH_TRAIN.jsonl:MATH_TEST.jsonl

A setting is NAME=POOL,POOL,...:TARGET,TARGET,...: JSON lines with `text`, or with `instruction`, `input` and `output`.
The output is one figure of all settings (held-out loss with the range over seeds, seconds by phase), results.json and
one table per setting. With --add the figure has the settings of an earlier command in the same folder too. Status 0
when LESS is better with every seed of every setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
sys.path.insert(0, str(ROOT))

DEMO = ROOT / ".demo" / "data"
DOMAINS = ("demo_c4", "demo_wiki", "demo_alpaca_text", "demo_python")
METHODS: dict[str, dict[str, Any]] = {
    "random": {"selector": "random"},
    "less": {"selector": "less"},
    "less, a third scored": {"selector": "less", "candidate_fraction": 0.34, "score_reuse": "latest"},
}
COLORS = ("#777777", "#c1440e", "#1f6fb2")
PHASE_COLORS = ("#b8b8b8", "#d9a441", "#5b8c5a", "#8a6bb1", "#4f7cac", "#a65353")


@dataclass
class Setting:
    """One pool and its targets."""

    name: str
    pool: list[Path]
    targets: list[Path]


@dataclass
class Outcome:
    """One run: held-out loss by step, and seconds by phase."""

    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def text_of(row: dict[str, str]) -> str:
    """A row as running text."""
    if "text" in row:
        return row["text"]
    question = "\n".join(line for line in (row["instruction"], row.get("input")) if line)
    return f"{question}\n\n{row['output']}\n"


def texts(file: Path) -> list[str]:
    """All rows of a file."""
    return [text_of(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_data(setting: Setting, folder: Path, options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """(names of the pool's data sets, names of the targets', held-out texts); a dataset_info.json beside them.

    Sources of the pool give equally much text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {}

    def write(name: str, rows: list[str]) -> str:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
        return name

    pool = [
        write(f"pool_{file.parent.name}_{file.stem}", first_rows(texts(file), options.characters))
        for file in setting.pool
    ]
    targets, held_out = [], []
    for file in setting.targets:
        rows = texts(file)
        half = len(rows) // 2
        targets.append(write(f"target_{file.parent.name}_{file.stem}", first_rows(rows[:half], options.target)))
        held_out += first_rows(rows[half:], options.held_out)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return pool, targets, held_out


def first_rows(rows: list[str], characters: int) -> list[str]:
    """The first rows that together have `characters` or more, or all."""
    first, total = [], 0
    for row in rows:
        first.append(row)
        total += len(row)
        if total >= characters:
            break
    return first


def make_model(folder: Path, rows: list[str], options: argparse.Namespace) -> None:
    """A small random Llama and a tokenizer of the pool's text."""
    from tools.tiny_model import ModelOptions, make_tokenizer, save
    from tools.tiny_model import make_model as random_model

    tokenizer = make_tokenizer(rows, 1024)
    save(random_model(ModelOptions(options.hidden, options.layers, 4, 2, len(tokenizer))), tokenizer, folder)


def config_of(
    folder: Path, names: tuple[list[str], list[str]], seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The keys that all methods share."""
    return {
        "model_name_or_path": str(folder / "model"), "train_from_scratch": True, "stage": "pt",
        "dataset_dir": str(folder / "data"), "dataset": ",".join(names[0]), "eval_dataset": ",".join(names[1]),
        "eval_on_each_dataset": True, "cutoff_len": options.length, "finetuning_type": "full", "seed": seed,
        "max_steps": options.steps, "warmup_step": options.warmup, "update_step": options.every,
        "update_times": options.updates,
        "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": options.warmup // 2, "logging_steps": 1000, "disable_tqdm": True,
        "save_strategy": "no", "eval_strategy": "no", "disable_gradient_checkpointing": True, "tensorboard": False,
        "overwrite_output_dir": True,
    }  # fmt: skip


class WatchedMetrics:
    """A run's metrics that also add up seconds by phase and measure the held-out loss every `every` steps."""

    def __init__(self, metrics: Any, measure: Any, every: int) -> None:
        self._metrics, self._measure, self._every = metrics, measure, every
        self.outcome = Outcome()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metrics, name)

    def on_step_end(self, state: Any, stats: Any, lr: float, phase_seconds: dict[str, float]) -> None:
        for phase, spent in phase_seconds.items():
            self.outcome.seconds[phase] = self.outcome.seconds.get(phase, 0.0) + spent
        self._metrics.on_step_end(state, stats, lr, phase_seconds)
        if state.step % self._every == 0:
            self.outcome.curve.append((state.step, self._measure()))


class Windows:
    """Rows of a pool: text in pieces of equal length."""

    def __init__(self, tokenizer: Any, rows: list[str], length: int) -> None:
        import numpy as np

        ids = [i for row in rows for i in [*tokenizer.encode(row), tokenizer.eos_token_id]]
        self.rows = np.array(ids[: len(ids) // length * length], dtype=np.int64).reshape(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: Any) -> list[Any]:
        return [(self.rows[row], self.rows[row]) for row in rows]


def train(keys: dict[str, Any], held_out: list[str], every: int) -> Outcome:
    """Train once in this process."""
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.data.pool import Domain, SamplePool
    from dataflex_mega.llamafactory.args import argument_types
    from dataflex_mega.run.build import build
    from dataflex_mega.signals.pool_share import PoolShare, evaluate

    run, trainer = build(parse_config(keys, argument_types()))
    windows = Windows(run.session.tokenizer, held_out, keys["cutoff_len"])
    share = PoolShare(SamplePool([Domain("held out", windows)]), run.session.score_batch_size, 0, 1)

    def measure() -> float:
        loss, tokens = evaluate(share, run.data.collate, trainer.engine.sample_losses)
        return float(loss.sum() / tokens.sum())

    watched = WatchedMetrics(trainer.metrics, measure, every)
    trainer.metrics = watched  # type: ignore[assignment]  # the same methods
    try:
        trainer.fit(None)
    finally:
        trainer.loader.close()
    return watched.outcome


def run_setting(setting: Setting, options: argparse.Namespace) -> dict[str, list[Outcome]]:
    """Method -> the outcome of each seed."""
    folder = options.output / setting.name
    pool, targets, held_out = write_data(setting, folder / "data", options)
    make_model(
        folder / "model", [row for file in setting.pool for row in first_rows(texts(file), options.characters)], options
    )
    outcomes: dict[str, list[Outcome]] = {name: [] for name in METHODS}
    for seed in range(options.seeds):
        for name, keys in METHODS.items():
            output = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            config = {**config_of(folder, (pool, targets), seed, options), **keys, "output_dir": str(output)}
            start = time.perf_counter()
            outcome = train(config, held_out, options.measure)
            outcomes[name].append(outcome)
            spent = time.perf_counter() - start
            print(
                f"{setting.name}, seed {seed}, {name}: held-out loss {outcome.curve[-1][1]:.4f}, {spent:.0f} s",
                flush=True,
            )
    return outcomes


def report(setting: Setting, outcomes: dict[str, list[Outcome]]) -> bool:
    """Print the table -> whether LESS is better with every seed."""
    base = [outcome.curve[-1][1] for outcome in outcomes["random"]]
    phases = phases_of(outcomes)
    print(f"\n{setting.name}: loss of the held-out target text after {outcomes['random'][0].curve[-1][0]} steps")
    print(
        f"{'method':26}{'mean':>9}{'spread':>9}{'to random':>11}{'better':>9}"
        + "".join(f"{p + ' s':>10}" for p in phases)
    )
    better = True
    for name, runs in outcomes.items():
        last = [outcome.curve[-1][1] for outcome in runs]
        wins = sum(ours < other for ours, other in zip(last, base, strict=True))
        better &= name == "random" or wins == len(last)
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        gain = statistics.mean(ours - other for ours, other in zip(last, base, strict=True))
        spent = "".join(f"{statistics.mean(o.seconds.get(p, 0.0) for o in runs):10.1f}" for p in phases)
        beats = "" if name == "random" else f"{wins} of {len(last)}"
        print(f"{name:26}{statistics.mean(last):9.4f}{spread:9.4f}{gain:+11.4f}{beats:>9}{spent}")
    return better


def draw(results: dict[str, dict[str, list[Outcome]]], target: Path) -> None:
    """One column per setting. Above: held-out loss by step, mean and range of the seeds. Below: seconds by phase, the mean
    of the seeds, with the range of their sums."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(results), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(results), squeeze=False, height_ratios=(2, 1))
    for column, (name, outcomes) in enumerate(results.items()):
        draw_losses(panels[0, column], outcomes)
        panels[0, column].set_title(name)
        draw_seconds(panels[1, column], outcomes)
    figure.savefig(target, dpi=110)


def draw_losses(axes: Any, outcomes: dict[str, list[Outcome]]) -> None:
    """Draw the held-out loss by step."""
    for (method, runs), color in zip(outcomes.items(), COLORS, strict=False):
        steps = [step for step, _ in runs[0].curve]
        columns = list(zip(*([loss for _, loss in run.curve] for run in runs), strict=True))
        axes.plot(steps, [statistics.mean(c) for c in columns], color=color, label=method)
        axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel="loss of held-out target text")
    axes.grid(alpha=0.3)
    axes.legend(title=f"mean and range of {len(runs)} seeds")


def draw_seconds(axes: Any, outcomes: dict[str, list[Outcome]]) -> None:
    """Draw one bar per method, divided into phases."""
    names = list(outcomes)
    start = [0.0] * len(names)
    for phase, color in zip(phases_of(outcomes), PHASE_COLORS, strict=False):
        spent = [statistics.mean(run.seconds.get(phase, 0.0) for run in outcomes[name]) for name in names]
        axes.barh(names, spent, left=start, color=color, label=phase)
        start = [before + more for before, more in zip(start, spent, strict=True)]
    sums = [[sum(run.seconds.values()) for run in outcomes[name]] for name in names]
    reach = [[mean - min(totals) for mean, totals in zip(start, sums, strict=True)]]
    reach.append([max(totals) - mean for mean, totals in zip(start, sums, strict=True)])
    axes.errorbar(start, names, xerr=reach, fmt="none", ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="seconds of a run")
    axes.legend(fontsize="small", ncol=3, loc="lower right", bbox_to_anchor=(1, 1))


def phases_of(outcomes: dict[str, list[Outcome]]) -> list[str]:
    """The phases of all runs, sorted by name."""
    return sorted({phase for runs in outcomes.values() for run in runs for phase in run.seconds})


def read_results(path: Path) -> dict[str, dict[str, list[Outcome]]]:
    """Setting -> method -> outcomes of an existing results.json; empty without one."""
    if not path.is_file():
        return {}
    saved = json.loads(path.read_text())
    return {s: {m: [Outcome(**run) for run in runs] for m, runs in outcomes.items()} for s, outcomes in saved.items()}


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """The requested settings, or the demo's two: instructions in a mixed pool, and source code."""
    if not options.setting:
        pool = [options.data / f"{name}.jsonl" for name in DOMAINS]
        validation = {name: options.data / f"{name}_validation.jsonl" for name in DOMAINS}
        return [
            Setting("instructions", pool, [validation["demo_alpaca_text"]]),
            Setting("source code", pool, [validation["demo_python"]]),
        ]
    settings = []
    for argument in options.setting:
        name, _, rest = argument.partition("=")
        pool_files, colon, target_files = rest.partition(":")
        if not colon:
            raise SystemExit(f"--setting {argument}: expected NAME=POOL,POOL,...:TARGET,TARGET,...")
        settings.append(Setting(name, *([Path(f) for f in files.split(",")] for files in (pool_files, target_files))))
    return settings


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO, help="folder of tools/demo_data.py")
    parser.add_argument("--setting", action="append", help="NAME=POOL,...:TARGET,...; may be given several times")
    parser.add_argument("--add", action="store_true", help="keep the settings of the results.json in --output")
    parser.add_argument("--output", type=Path, default=ROOT / ".demo" / "less_vs_random", help="folder to write")
    for name, value, what in (
        ("seeds", 3, "seeds"), ("steps", 100, "steps of a run"), ("warmup", 20, "steps before a first selection"),
        ("every", 15, "steps of a selection"), ("updates", 2, "selections until the next warm-up"),
        ("measure", 10, "steps between two measurements"), ("length", 64, "tokens per sample"),
        ("hidden", 48, "hidden size"), ("layers", 2, "layers"), ("characters", 35_000, "of each source of the pool"),
        ("target", 6_000, "characters of each target"), ("held_out", 12_000, "characters measured, of each target"),
    ):  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{what} ({value})")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    good = True
    results = read_results(options.output / "results.json") if options.add else {}
    for setting in settings_of(options):
        results[setting.name] = run_setting(setting, options)
        good &= report(setting, results[setting.name])
        draw(results, options.output / "less_vs_random.png")
        plain = {s: {m: [vars(o) for o in runs] for m, runs in outcomes.items()} for s, outcomes in results.items()}
        (options.output / "results.json").write_text(json.dumps(plain, indent=1))
    print(f"\n{options.output}: less_vs_random.png, results.json")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
