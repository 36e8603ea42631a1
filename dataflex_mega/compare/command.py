"""`dataflex-cli compare SUITE.yaml`: train the missing runs, evaluate, report."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from dataflex_mega.compare import perplexity, plots, report, results, runner, suite
from dataflex_mega.compare.progress import ComparisonProgress
from dataflex_mega.compare.suite import Suite, TrainingRun
from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.load import resolve
from dataflex_mega.config.megatron_checks import check_megatron
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError, UserError, did_you_mean
from dataflex_mega.files import atomic_write
from dataflex_mega.llamafactory.args import argument_types
from dataflex_mega.log import get_logger, log_notes

HELP = """usage: dataflex-cli compare SUITE.yaml [--collect] [--rerun NAME ...] [key=value ...]

Trains every method with every seed, measures held-out perplexity, and writes report.md, results.json, results.csv and
plots into the suite's output_dir. Given again, it trains what is missing only; a run that was stopped continues.

  base:        the training YAML that all methods change, or its keys
  methods:     name -> the keys it changes; or a list of phases, each with a name under `phase`, whose last is compared
               and which may read what an earlier one wrote: ${name.output_dir}
  seeds:       [1, 2, 3]
  output_dir:  runs go to METHOD/seed-N below it
  processes:   of each run, through torchrun; 1
  launch:      run, or print: one torchrun line for each run, to be started elsewhere; then `--collect`

  --collect     train nothing; report what is finished
  --rerun NAME  discard the results of a run (odm/seed-1), or of a method (odm), and train it anew
  key=value     changes a key of the suite for this call; base.max_steps=100 one of the base

dataflex-cli compare examples/compare/suite.yaml seeds=[1] base.max_steps=20"""


@dataclass(frozen=True)
class CompareArguments:
    """The parsed command line."""

    path: str
    overrides: list[str]
    rerun: list[str]
    collect: bool


def parse_arguments(arguments: Sequence[str]) -> CompareArguments:
    """Parse the command line. Raises UserError for an unknown flag or one without its value."""
    path, overrides, rerun, collect = None, [], [], False
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if argument == "--collect":
            collect = True
        elif flag == "--rerun":
            name = value if equals else next(remaining, "")
            if not name:
                raise UserError("--rerun: the name of a run or method is missing, such as odm/seed-1")
            rerun.append(name)
        elif argument.startswith("-"):
            raise UserError(f"compare: unknown option {flag!r}{did_you_mean(flag, ['--collect', '--rerun'])}")
        elif path is None:
            path = argument
        else:
            overrides.append(argument)
    if path is None:
        raise UserError("compare: the suite file is missing; compare --help says more")
    return CompareArguments(path, overrides, rerun, collect)


def main(arguments: Sequence[str]) -> int:
    """0 when every run has a result; 1 when some failed or are missing. Raises UserError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    options = parse_arguments(arguments)
    plan = suite.read(options.path, options.overrides)
    keys = check_runs(plan)
    missing = runner.prepare(plan, options.rerun)
    failed: dict[str, str] = {}
    if options.collect:
        pass
    elif plan.launch == "print":
        return print_launch_lines(plan, missing)
    else:
        failed = train_missing(plan, missing)
    comparison = evaluate_and_report(plan, keys, failed)
    return 1 if comparison.missing else 0


def check_runs(plan: Suite) -> dict[str, str]:
    """Check every run's configuration before the first is trained -> LLaMA-Factory's keys. Raises ConfigError.

    A note is written once, with the methods it is about in front where it is not about all.
    """
    known = argument_types()
    notes: dict[str, list[str]] = {}
    checked: list[str] = []
    for run in plan.runs:
        if run.seed != plan.seeds[0] or run.needs_earlier_phase:  # it may name files that do not exist yet
            continue
        try:
            config = parse_config(resolve(dict(run.config), run.key), known)
            found = [*config.notes, *(check_dynamic(config) if config.dataflex.train_type != "static" else ())]
            found += check_megatron(config) if config.engine == "megatron" else ()
            perplexity.check_stage(config.llamafactory)
        except ConfigError as error:
            raise ConfigError(f"{_name_of(run)}: {error}") from error
        checked.append(_name_of(run))
        for note in dict.fromkeys(found):
            notes.setdefault(note, []).append(_name_of(run))
    log_notes(note if names == checked else f"{', '.join(names)}: {note}" for note, names in notes.items())
    return known


def _name_of(run: TrainingRun) -> str:
    return f"methods.{run.method}{'.' * bool(run.phase)}{run.phase}"


def print_launch_lines(plan: Suite, missing: Sequence[TrainingRun]) -> int:
    """Write the command of every unfinished run to standard output and into launch.sh."""
    lines = runner.launch_lines(missing, plan.processes)
    atomic_write(plan.output_dir / "launch.sh", "".join(line + "\n" for line in ["set -e", *lines]))
    print("\n".join(lines))
    rest = f"{len(lines)} of {len(plan.runs)} runs are missing; {plan.output_dir / 'launch.sh'} has these lines"
    get_logger().info("%s. Phases of a method must run in this order. Then: compare --collect", rest)
    return 0


def train_missing(plan: Suite, missing: Sequence[TrainingRun]) -> dict[str, str]:
    """Train with a progress display -> failed run -> reason. A termination signal ends the training process too."""
    progress = ComparisonProgress()
    with exit_on_signal(signal.SIGTERM):
        try:
            return runner.train(plan, missing, progress).failed
        finally:
            progress.close()


@contextmanager
def exit_on_signal(number: signal.Signals) -> Iterator[None]:
    """Raise SystemExit on a signal, so that the training process is stopped in `finally` blocks."""

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, before)


def evaluate_and_report(plan: Suite, keys: Mapping[str, str], failed: Mapping[str, str]) -> results.Comparison:
    """Evaluate, write the report and print the table. Raises ConfigError when no method has a result."""
    progress = ComparisonProgress()
    comparison = results.collect(plan, partial(evaluate_run, keys, progress), failed)
    if not comparison.results:
        key, why = next(iter(comparison.missing.items()))
        raise ConfigError(f"{plan.output_dir}: no finished run to report; {key}: {why}")
    plot_files = plots.plot_comparison(comparison)
    files = report.write(comparison, plot_files)
    report.print_table(comparison, progress.console)
    for key, why in comparison.missing.items():
        progress.print_line(f"no result: {key}: {why}")
    progress.print_line(f"written: {', '.join(str(path) for path in [*files, *plot_files])}")
    return comparison


def evaluate_run(keys: Mapping[str, str], progress: ComparisonProgress, run: TrainingRun) -> dict[str, Any]:
    """Held-out perplexity of a finished run's model."""
    logging.getLogger("llamafactory").setLevel(logging.ERROR)  # it repeats the same hints for every model
    names = suite.parse_names(run.config["eval_dataset"])
    config = parse_config(resolve(dict(run.config), run.key), keys)
    size = int(run.config.get("per_device_eval_batch_size", 8))
    with progress.evaluation_bar(run.key) as on_batch:
        lf = perplexity.evaluation_keys(config.llamafactory, keys, run.folder, names)
        sums = perplexity.evaluate(lf, size, on_batch, config.dataflex.eval_corpus_dir)
    return perplexity.summary(sums)
