"""Text files -> Megatron .bin/.idx files, one pair a domain, and a manifest, for `corpus_dir` of a training YAML.

    dataflex-cli corpus slimpajama/ --domain-field meta.redpajama_set_name --tokenizer MODEL --output corpus --workers 8
    dataflex-cli corpus code.jsonl.zst --domain code --tokenizer MODEL --output corpus
    dataflex-cli corpus code=code.jsonl books=books/ --tokenizer MODEL --output corpus
    dataflex-cli corpus --dataset c4_demo,wiki_demo --dataset-dir data --tokenizer MODEL --output corpus

An input is a file (.jsonl, .json, .parquet; .jsonl or .json also as .gz and .zst), a folder of such files, or
NAME=PATH, which makes all of PATH the domain NAME. A killed run goes on where it stopped when the same command is given
again, and the result has the same bytes whatever the number of workers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dataflex_mega.corpus.parts import Part
from dataflex_mega.corpus.prepare import BAD_ROWS, Job, Result, prepare
from dataflex_mega.corpus.sources import KINDS, Rule, Source, make_source
from dataflex_mega.errors import ConfigError, DataError, UserError, did_you_mean

EVERY = 10.0  # seconds between lines where standard error is not a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 after one line for a user's mistake; 130 when interrupted."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 130


def run(arguments: Sequence[str]) -> int:
    """Prepare a corpus as the command line says and print what was made. Raises UserError."""
    options = parser().parse_args(arguments)
    meter = Meter()
    try:
        result = prepare(job_of(options), meter)
    except OSError as error:
        raise DataError(f"{error.filename or options.output}: {error.strerror or error}") from error
    finally:
        meter.end()
    print(summary(result, options.output))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="dataflex-cli corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="a file, a folder, or NAME=PATH")
    add("--output", type=Path, required=True, help="folder of the corpus")
    add("--tokenizer", required=True, help="Hugging Face tokenizer, as model_name_or_path of the training")
    add("--domain", metavar="NAME", help="the domain of every row of all inputs")
    add("--domain-field", metavar="FIELD", help="field that names a row's domain; dots go into mappings")
    add("--text-field", metavar="FIELD", default="text", help="field of the text (text)")
    add("--dataset", default="", help="LLaMA-Factory datasets, comma separated; each is a domain")
    add("--dataset-dir", type=Path, default=Path("data"), help="folder of their dataset_info.json (data)")
    add("--workers", type=int, default=1, help="processes (1)")
    add("--max-bad", type=float, default=0.01, metavar="SHARE", help="stop when more rows are bad than this (0.01)")
    add("--unit-mb", type=float, default=32, help="input of one unit of work, in MiB (32)")
    add("--longest-mb", type=float, default=64, help="a longer line is a bad row, in MiB (64)")
    add("--overwrite", action="store_true", help="replace what the output folder holds")
    return made


def job_of(options: argparse.Namespace) -> Job:
    """The options as a job. Raises ConfigError or DataError naming the one that cannot be."""
    if options.workers < 1:
        raise ConfigError(f"--workers: must be >= 1, found {options.workers}")
    if not 0 <= options.max_bad <= 1:
        raise ConfigError(f"--max-bad: must be from 0 to 1, found {options.max_bad}")
    for name in ("unit_mb", "longest_mb"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: must be > 0, found {getattr(options, name)}")
    if options.domain and options.domain_field:
        raise ConfigError("--domain, --domain-field: both are given; choose one")
    sources = [*(s for text in options.inputs for s in _input(text, options)), *_datasets(options)]
    if not sources:
        raise ConfigError("no input: name files or folders, or --dataset")
    paths = [source.path for source in sources]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is an input {paths.count(path)} times")
    mebi = 1 << 20
    return Job(
        sources=tuple(sources),
        tokenizer=options.tokenizer,
        output=options.output,
        workers=options.workers,
        max_bad=options.max_bad,
        unit_bytes=max(1, int(options.unit_mb * mebi)),
        longest=max(1, int(options.longest_mb * mebi)),
        overwrite=options.overwrite,
    )


# -- inputs ------------------------------------------------------------------------------------------------------------


def _input(text: str, options: argparse.Namespace) -> list[Source]:
    """The files of one INPUT."""
    name, equals, rest = text.partition("=")
    named = bool(equals) and not Path(text).exists()
    path = Path(rest if named else text)
    domain = name if named else options.domain
    if named and not name:
        raise ConfigError(f"{text}: expected NAME=PATH")
    if domain is None and options.domain_field is None:
        raise ConfigError(f"{text}: whose domain? give --domain-field, --domain or NAME=PATH")
    rule = Rule((options.text_field,), domain, None if domain is not None else options.domain_field)
    return [make_source(file, rule) for file in _files(path)]


def _files(path: Path) -> list[Path]:
    """A file, or the readable files of a folder and its subfolders, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} not found{did_you_mean(path.name, near)}")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(tuple(KINDS)))
    if not found:
        raise DataError(f"{path}: no file in it ends in {', '.join(KINDS)}")
    return found


def _datasets(options: argparse.Namespace) -> list[Source]:
    """The files of `--dataset`: datasets of a dataset_info.json whose rows LLaMA-Factory's pre-training would read."""
    names = [name.strip() for name in options.dataset.split(",") if name.strip()]
    if not names:
        return []
    info = options.dataset_dir / "dataset_info.json"
    try:
        known = json.loads(info.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"--dataset-dir: {info} not found") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{info}, line {error.lineno}: not JSON: {error.msg}") from error
    found = []
    for name in names:
        if name not in known:
            raise DataError(f"--dataset: {name!r} is not in {info}{did_you_mean(name, known)}")
        entry = known[name]
        if "file_name" not in entry or entry.get("formatting", "alpaca") != "alpaca":
            raise DataError(
                f"--dataset: {name!r} must have a file_name and alpaca rows; save it as .jsonl and name that"
            )
        columns = entry.get("columns") or {}
        given = columns or {"prompt": "instruction", "query": "input"}
        text = tuple(given[key] for key in ("prompt", "query") if given.get(key))
        if not given.get("prompt"):
            raise DataError(f"--dataset: {name!r} names no column `prompt` in {info}")
        domain = options.domain or (None if options.domain_field else name)
        rule = Rule(text, domain, options.domain_field)
        found += [make_source(file, rule) for file in _files(options.dataset_dir / entry["file_name"])]
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


class Meter:
    """A bar on a terminal; a line now and then elsewhere. Both on standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._total = self._done = self._tokens = self._bad = 0
        self._start = self._said = 0.0

    def begin(self, total: int, done: int) -> None:
        """Start at `done` of `total` bytes."""
        self._total, self._done, self._start = total, done, time.monotonic()
        self._said = self._start
        if done:
            self._console.print(f"going on: {done / (total or 1):.1%} was done before", highlight=False)
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
            self._bar = RichProgress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._bar.add_task("read", total=total, completed=done, text="")
            self._bar.start()

    def unit(self, size: int, part: Part) -> None:
        """Move on by a unit."""
        self._done, self._tokens, self._bad = self._done + size, self._tokens + part.tokens, self._bad + part.bad
        now = time.monotonic()
        text = f"{self._tokens:,} tokens, {self._tokens / max(now - self._start, 1e-9):,.0f} a second, {self._bad} bad rows"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        elif now - self._said >= EVERY or self._done == self._total:
            self._said = now
            self._console.print(f"{self._done / (self._total or 1):.1%}  {text}", highlight=False, soft_wrap=True)

    def merging(self, domains: int) -> None:
        """Say so."""
        self.end()
        self._console.print(f"merging {domains} domain{'s' if domains > 1 else ''}", highlight=False)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def summary(result: Result, output: Path) -> str:
    """What is in the corpus, line by line."""
    corpus = result.corpus
    width = max(len("domain"), *(len(name) for name in corpus.names))
    lines = [f"{'domain':<{width}} {'documents':>12} {'tokens':>16} {'share':>8}"]
    for domain in corpus.domains:
        lines.append(f"{domain.name:<{width}} {domain.documents:>12,} {domain.tokens:>16,} {domain.proportion:>8.4f}")
    lines.append(f"{'all':<{width}} {sum(d.documents for d in corpus.domains):>12,} {corpus.tokens:>16,} {1:>8.4f}")
    lines.append(
        f"rows {corpus.rows:,}, bad {corpus.bad_rows:,}" + (f": {output / BAD_ROWS}" if corpus.bad_rows else "")
    )
    for problem, (count, first) in result.problems.items():
        key = "line" if "line" in first else "row"
        lines.append(f"  {count:,} x {problem}; first in {first['file']}, {key} {first[key]}")
    shares = ", ".join(f"{domain.proportion:.6f}" for domain in corpus.domains)
    lines.append(f"natural proportions: init_mixture_proportions: [{shares}]")
    lines.append(f"{'written to' if result.made else 'already in'} {output}; train with corpus_dir: {output}")
    return "\n".join(lines)
