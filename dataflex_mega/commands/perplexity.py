"""Held-out perplexity of a model in Hugging Face layout, by data set and overall.

    dataflex-cli perplexity --model saves/run --dataset-dir data --dataset c4_validation,wiki_validation
    dataflex-cli perplexity --model saves/run --corpus corpus/slimpajama_validation
    dataflex-cli perplexity --config run.yaml

With --config, the data is that of a training YAML's eval_dataset or eval_corpus_dir, read as it says, and the model in
the output_dir of that training. Text becomes rows as in training: packed into rows of --cutoff-len tokens (stage pt), or
one conversation per row, of which the answers count (stage sft). A corpus is read in rows of --cutoff-len tokens.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.exit_status import OneLineParser

SUMMARY = "perplexity --model FOLDER ...  held-out perplexity of a model by data set, or of a run: --config RUN.yaml"
HELP_ORDER = 75
# Keys of a training YAML that this command's options stand for, as messages name them.
OPTION_OF_KEY = {
    "eval_corpus_dir": "--corpus", "eval_dataset": "--dataset", "dataset_dir": "--dataset-dir", "dataset": "--dataset",
    "cutoff_len": "--cutoff-len", "model_name_or_path": "--model", "adapter_name_or_path": "--adapter",
    "template": "--template", "stage": "--stage", "batch size": "--batch-size",
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Evaluate, print, and write what --output asks for -> 0. Raises UserError."""
    from dataflex_mega.files import atomic_write

    options = build_parser().parse_args(list(argv))
    try:
        summary = run(options)
    except UserError as error:
        if options.config is not None:  # its keys are the user's own
            raise
        raise type(error)(with_options(str(error))) from error
    print("\n".join(format_table(summary)))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.output, json.dumps(summary, indent=1))
    return 0


def with_options(message: str) -> str:
    """A message about keys, with the options that stand for them; a key of one word only where it begins the message."""
    for key, option in OPTION_OF_KEY.items():
        anywhere = rf"(?<![\w./-]){key}(?![\w./-])" if "_" in key else rf"^{key}(?=:| '|$)"
        message = re.sub(anywhere, option, message)
    return message


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = OneLineParser(
        prog="dataflex-cli perplexity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder with weights and tokenizer; with --config: in place of its output_dir")
    parser.add_argument("--adapter", help="folder of a LoRA adapter for --model")
    parser.add_argument("--config", help="a training YAML")
    parser.add_argument("--corpus", help="folder of a corpus; every domain of it, or those that --dataset names")
    parser.add_argument("--dataset", help="names from dataset_info.json, between commas; each is a domain")
    parser.add_argument("--dataset-dir", default="data", help="folder of dataset_info.json (data)")
    parser.add_argument("--stage", choices=("pt", "sft"), default="pt", help="how rows are made (pt)")
    parser.add_argument("--template", help="LLaMA-Factory's chat template, for --stage sft")
    parser.add_argument("--cutoff-len", type=int, default=2048, help="tokens of a row (2048)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a forward pass (8)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--output", type=Path, help="write the result to this JSON file")
    return parser


def evaluation_keys(options: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """(LLaMA-Factory's keys of the evaluation, folder of a corpus or None). Raises ConfigError for a missing option."""
    from dataflex_mega.compare import perplexity
    from dataflex_mega.compare.suite import parse_names

    if options.config is not None:
        from dataflex_mega.config.load import load
        from dataflex_mega.config.parse import parse_config
        from dataflex_mega.llamafactory.args import argument_types

        known = argument_types()
        whole = parse_config(load(options.config), known)
        config, corpus = whole.llamafactory, options.corpus or whole.dataflex.eval_corpus_dir
        names = names_or_all(parse_names(options.dataset or config.get("eval_dataset")), corpus)
        if not names:
            raise ConfigError(f"{options.config}: eval_dataset is missing; --dataset or --corpus say what to measure")
        return perplexity.evaluation_keys(config, known, Path(options.model or config["output_dir"]), names), corpus
    for name in ("model", "dataset") if options.corpus is None else ("model",):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing; or --config with a training YAML")
    required = {
        "model_name_or_path": options.model,
        "dataset": ",".join(names_or_all(parse_names(options.dataset), options.corpus)),
        "dataset_dir": options.dataset_dir,
        "stage": options.stage,
        "cutoff_len": options.cutoff_len,
        "finetuning_type": "full" if options.adapter is None else "lora",
        "output_dir": str(Path(options.model) / perplexity.TRAINING_FILE),
        "disable_gradient_checkpointing": True,
        "bf16": options.bf16,
    }
    optional = {"adapter_name_or_path": options.adapter, "template": options.template}
    return {**required, **{key: value for key, value in optional.items() if value is not None}}, options.corpus


def names_or_all(names: list[str], corpus: str | None) -> list[str]:
    """The names, or all domains of the corpus where there are none. Raises DataError."""
    from dataflex_mega.data import manifest

    if names or corpus is None:
        return names
    return list(manifest.read(corpus, "--corpus").names)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate with a progress bar -> perplexity.summary. Raises UserError."""
    from rich.console import Console
    from rich.progress import Progress

    from dataflex_mega.compare import perplexity

    keys, corpus = evaluation_keys(options)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("perplexity", total=None)
        sums = perplexity.evaluate(
            keys, options.batch_size, lambda done, total: progress.update(task, completed=done, total=total), corpus
        )
    return perplexity.summary(sums)


def format_table(summary: dict[str, Any]) -> list[str]:
    """The lines to print, one per data set."""
    lines = [f"{'data set':<32} {'perplexity':>12} {'loss':>9} {'tokens':>12}"]
    for name, row in {**summary["domains"], "overall": summary["overall"], "macro": summary["macro"]}.items():
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        lines.append(f"{name:<32} {row['perplexity']:>12.4f} {row['loss']:>9.5f} {tokens:>12}")
    return lines
