"""Text files -> Megatron .bin/.idx files, one pair per domain, and a manifest, for `corpus_dir` of a training YAML.

    dataflex-cli corpus slimpajama/ --domain-field meta.redpajama_set_name --tokenizer MODEL --output corpus --workers 8
    dataflex-cli corpus code.jsonl.zst --domain code --tokenizer MODEL --output corpus
    dataflex-cli corpus code=code.jsonl books=books/ --tokenizer MODEL --output corpus
    dataflex-cli corpus --from-megatron mg/web_text_document mg/code_text_document --tokenizer MODEL
    dataflex-cli corpus --dataset c4_demo,wiki_demo --dataset-dir data --tokenizer MODEL --output corpus

An input is a file (.jsonl, .json, .parquet, .txt, whose lines are texts; all but .parquet also as .gz and .zst), a folder
of such files, or NAME=PATH, which makes all of PATH the domain NAME. A killed run continues where it stopped when the same
command is given again, and the result has the same bytes whatever the number of workers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import dataflex_mega.corpus.from_megatron as from_megatron
import dataflex_mega.data.dataset_info as dataset_info
from dataflex_mega.corpus.input_files import KINDS, FieldRule, InputFile, open_input
from dataflex_mega.corpus.prepare import BAD_ROWS, PrepareJob, PrepareResult, prepare
from dataflex_mega.corpus.progress import ProgressDisplay
from dataflex_mega.errors import ConfigError, DataError, did_you_mean
from dataflex_mega.exit_status import OneLineParser, exit_status
from dataflex_mega.log import get_logger


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 after one line for a user's mistake; 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: run(arguments), "interrupted; the same command continues from here")


def run(arguments: Sequence[str]) -> int:
    """Prepare the corpus of the command line and print its domains. Raises UserError."""
    options = parser().parse_args(arguments or ["--help"])
    if options.from_megatron:
        return run_from_megatron(options)
    for name in ("output", "tokenizer"):
        if getattr(options, name) is None:
            raise ConfigError(f"dataflex-cli corpus: --{name} is missing; dataflex-cli corpus --help says more")
    progress = ProgressDisplay()
    try:
        result = prepare(build_job(options), progress)
    except OSError as error:
        raise DataError(f"{error.filename or options.output}: {error.strerror or error}") from error
    finally:
        progress.close()
    print(summary(result, options.output))
    return 0


def run_from_megatron(options: argparse.Namespace) -> int:
    """Write a manifest for files that exist and print its domains. Raises UserError."""
    if options.inputs or options.dataset:
        raise ConfigError("--from-megatron: takes prefixes of .bin/.idx files and no other input")
    corpus, notes = from_megatron.describe(options.from_megatron, options.output, options.tokenizer, options.overwrite)
    for note in notes:
        get_logger().info("note: %s", note)
    print(summary(PrepareResult(corpus, {}, is_new=True), corpus.folder))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `dataflex-cli corpus`."""
    result = OneLineParser(
        prog="dataflex-cli corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="a file, a folder, or NAME=PATH")
    add(
        "--from-megatron",
        nargs="+",
        metavar="PREFIX",
        help="existing .bin/.idx of Megatron-LM, or NAME=PREFIX",
    )
    add("--output", type=Path, help="folder of the corpus; with --from-megatron: that of the files")
    add("--tokenizer", help="Hugging Face tokenizer, as model_name_or_path of the training")
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
    return result


def build_job(options: argparse.Namespace) -> PrepareJob:
    """The options as a job. Raises ConfigError or DataError naming an invalid one."""
    if options.workers < 1:
        raise ConfigError(f"--workers: must be >= 1, found {options.workers}")
    if not 0 <= options.max_bad <= 1:
        raise ConfigError(f"--max-bad: must be from 0 to 1, found {options.max_bad}")
    for name in ("unit_mb", "longest_mb"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: must be > 0, found {getattr(options, name)}")
    if options.domain and options.domain_field:
        raise ConfigError("--domain, --domain-field: both are given; choose one")
    files = [
        *(file for text in options.inputs for file in _files_of_input(text, options)),
        *_files_of_datasets(options),
    ]
    if not files:
        raise ConfigError("no input: name files or folders, or --dataset")
    paths = [file.path for file in files]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(f"{path} is an input {paths.count(path)} times")
    mebi = 1 << 20
    return PrepareJob(
        input_files=tuple(files),
        tokenizer=options.tokenizer,
        output=options.output,
        workers=options.workers,
        max_bad=options.max_bad,
        unit_bytes=max(1, int(options.unit_mb * mebi)),
        max_document_bytes=max(1, int(options.longest_mb * mebi)),
        overwrite=options.overwrite,
    )


# -- inputs ------------------------------------------------------------------------------------------------------------


def _files_of_input(text: str, options: argparse.Namespace) -> list[InputFile]:
    """The files of one INPUT argument."""
    name, equals, rest = text.partition("=")
    named = bool(equals) and not Path(text).exists()
    path = Path(rest if named else text)
    domain = name if named else options.domain
    if named and not name:
        raise ConfigError(f"{text}: expected NAME=PATH")
    if domain is None and options.domain_field is None:
        raise ConfigError(f"{text}: whose domain? give --domain-field, --domain or NAME=PATH")
    rule = FieldRule((options.text_field,), domain, None if domain is not None else options.domain_field)
    return [open_input(file, rule) for file in _find_files(path)]


def _find_files(path: Path) -> list[Path]:
    """A file, or the readable files of a folder and its subfolders, by name."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} not found{did_you_mean(path.name, near)}")
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(tuple(KINDS)))
    if not files:
        raise DataError(f"{path}: no file in it ends in {', '.join(KINDS)}")
    return files


def _files_of_datasets(options: argparse.Namespace) -> list[InputFile]:
    """The files of `--dataset`: datasets of a dataset_info.json whose rows LLaMA-Factory's pre-training would read."""
    names = [name.strip() for name in options.dataset.split(",") if name.strip()]
    if not names:
        return []
    info = options.dataset_dir / dataset_info.NAME
    known = dataset_info.read(options.dataset_dir, "--dataset-dir")
    files = []
    for name in names:
        if name not in known:
            raise DataError(f"--dataset: {name!r} is not in {info}{did_you_mean(name, known)}")
        entry = known[name]
        dataset_info.check_entry(name, entry, str(info))
        if "file_name" not in entry or entry.get("formatting", "alpaca") != "alpaca":
            raise DataError(
                f"--dataset: {name!r} must have a file_name and alpaca rows; save it as .jsonl and name that"
            )
        columns = entry.get("columns") or {"prompt": "instruction", "query": "input"}
        text = tuple(columns[key] for key in ("prompt", "query") if columns.get(key))
        if not columns.get("prompt"):
            raise DataError(f"--dataset: {name!r} names no column `prompt` in {info}")
        domain = options.domain or (None if options.domain_field else name)
        rule = FieldRule(text, domain, options.domain_field)
        files += [open_input(file, rule) for file in _find_files(options.dataset_dir / entry["file_name"])]
    return files


# -- output -----------------------------------------------------------------------------------------------------


def summary(result: PrepareResult, output: Path) -> str:
    """The domains of the corpus and the problems of bad rows, as lines of text."""
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
    proportions = ", ".join(f"{domain.proportion:.6f}" for domain in corpus.domains)
    lines.append(f"natural proportions: init_mixture_proportions: [{proportions}]")
    lines.append(f"{'written to' if result.is_new else 'already in'} {output}; train with corpus_dir: {output}")
    return "\n".join(lines)
