"""`dataflex-cli compare SUITE.yaml`: train what is missing, measure, report."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from dataflex_mega.compare import perplexity, report, results, runner, suite
from dataflex_mega.compare import plots as pictures
from dataflex_mega.compare.progress import Board
from dataflex_mega.compare.suite import Run, Suite
from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.load import resolve
from dataflex_mega.config.parse import split
from dataflex_mega.errors import ConfigError, UserError, did_you_mean

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
class Options:
    """The command line."""

    path: str
    overrides: list[str]
    rerun: list[str]
    collect: bool


def parse(arguments: Sequence[str]) -> Options:
    """Raises UserError for a flag that does not exist or lacks its value."""
    path, overrides, rerun, collect = None, [], [], False
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if argument == "--collect":
            collect = True
        elif flag == "--rerun":
            name = value if equals else next(waiting, "")
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
    return Options(path, overrides, rerun, collect)


def main(arguments: Sequence[str]) -> int:
    """0 when every run has a result; 1 when some failed or are missing. Raises UserError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    options = parse(arguments)
    chosen = suite.read(options.path, options.overrides)
    keys = check(chosen)
    missing = runner.prepare(chosen, options.rerun)
    failed: dict[str, str] = {}
    if options.collect:
        pass
    elif chosen.launch == "print":
        return print_lines(chosen, missing)
    else:
        failed = train(chosen, missing)
    found = gather(chosen, keys, failed)
    return 1 if found.missing else 0


def check(chosen: Suite) -> dict[str, str]:
    """Find mistakes in any run's configuration before the first is trained -> LLaMA-Factory's keys. Raises ConfigError."""
    from dataflex_mega.llamafactory.args import keys

    known = keys()
    for run in chosen.runs:
        if run.seed != chosen.seeds[0] or run.waits:  # what waits may name files that are not there yet
            continue
        try:
            config = split(resolve(dict(run.config), run.key), known)
            if config.ours.train_type != "static":
                check_dynamic(config)
        except ConfigError as error:
            raise ConfigError(f"methods.{run.method}{'.' * bool(run.phase)}{run.phase}: {error}") from error
    return known


def print_lines(chosen: Suite, missing: Sequence[Run]) -> int:
    """The command of every run that is not finished, to standard output and into launch.sh."""
    lines = runner.launch_lines(missing, chosen.processes)
    runner.write_beside(chosen.output / "launch.sh", "".join(line + "\n" for line in ["set -e", *lines]))
    print("\n".join(lines))
    rest = f"{len(lines)} of {len(chosen.runs)} runs are missing; {chosen.output / 'launch.sh'} has these lines"
    print(f"{rest}. Phases of a method must run in this order. Then: compare --collect", file=sys.stderr)
    return 0


def train(chosen: Suite, missing: Sequence[Run]) -> dict[str, str]:
    """Train with progress shown -> the runs that failed, with the reason. A termination signal ends the training too."""
    board = Board()
    with ended_by(signal.SIGTERM):
        try:
            return runner.train(chosen, missing, board).failed
        finally:
            board.end()


@contextmanager
def ended_by(number: signal.Signals) -> Iterator[None]:
    """Turn a signal into SystemExit, so that what was started is ended as well."""

    def leave(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, before)


def gather(chosen: Suite, keys: Mapping[str, str], failed: Mapping[str, str]) -> results.Comparison:
    """Measure, write the report and print the table. Raises ConfigError when no method has a result."""
    board = Board()
    found = results.collect(chosen, partial(measure, keys, board), failed)
    if not found.results:
        key, why = next(iter(found.missing.items()))
        raise ConfigError(f"{chosen.output}: no finished run to report; {key}: {why}")
    plots = pictures.draw(found)
    files = report.write(found, plots)
    report.show(found, board.console)
    for key, why in found.missing.items():
        board.note(f"no result: {key}: {why}")
    board.note(f"written: {', '.join(str(path) for path in [*files, *plots])}")
    return found


def measure(keys: Mapping[str, str], board: Board, run: Run) -> dict[str, Any]:
    """Held-out perplexity of a finished run's model."""
    logging.getLogger("llamafactory").setLevel(logging.ERROR)  # it gives the same advice for every model
    names = suite.listed(run.config["eval_dataset"])
    config = split(resolve(dict(run.config), run.key), keys)
    size = int(run.config.get("per_device_eval_batch_size", 8))
    with board.measuring(run.key) as progress:
        lf = perplexity.keys_of_run(config.lf, keys, run.folder, names)
        found = perplexity.measure(lf, size, progress, config.ours.eval_corpus_dir)
    return perplexity.summary(found)
