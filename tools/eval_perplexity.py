"""Held-out perplexity of a model in Hugging Face layout, by data set and overall.

    python tools/eval_perplexity.py --model saves/run --dataset-dir data --dataset c4_validation,wiki_validation
    python tools/eval_perplexity.py --model saves/run --corpus corpus/slimpajama_validation
    python tools/eval_perplexity.py --config run.yaml

With --config, the data is that of a training YAML's eval_dataset or eval_corpus_dir, read as it says, and the model what
that training left in its output_dir. Text is cut as for training: packed into rows of --cutoff-len tokens (stage pt), or
one conversation a row of which the answers count (stage sft). A corpus is cut into windows of --cutoff-len tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dataflex_mega.compare import perplexity
from dataflex_mega.compare.runner import write_beside
from dataflex_mega.compare.suite import listed
from dataflex_mega.data import manifest
from dataflex_mega.errors import ConfigError, UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", help="folder with weights and tokenizer; with --config: in place of its output_dir")
    made.add_argument("--adapter", help="folder of a LoRA adapter for --model")
    made.add_argument("--config", help="a training YAML")
    made.add_argument("--corpus", help="folder of a corpus; every domain of it, or those that --dataset names")
    made.add_argument("--dataset", help="names from dataset_info.json, between commas; each is a domain")
    made.add_argument("--dataset-dir", default="data", help="folder of dataset_info.json (data)")
    made.add_argument("--stage", choices=("pt", "sft"), default="pt", help="how rows are made (pt)")
    made.add_argument("--template", help="LLaMA-Factory's chat template, for --stage sft")
    made.add_argument("--cutoff-len", type=int, default=2048, help="tokens of a row (2048)")
    made.add_argument("--batch-size", type=int, default=8, help="rows of a forward pass (8)")
    made.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    made.add_argument("--output", type=Path, help="write the result to this JSON file")
    return made


def keys_of(given: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """(LLaMA-Factory's keys of the evaluation, folder of a corpus or None). Raises ConfigError for a missing option."""
    if given.config is not None:
        from dataflex_mega.config.load import load
        from dataflex_mega.config.parse import split
        from dataflex_mega.llamafactory.args import keys

        known = keys()
        whole = split(load(given.config), known)
        config, corpus = whole.lf, given.corpus or whole.ours.eval_corpus_dir
        names = named(listed(given.dataset or config.get("eval_dataset")), corpus)
        if not names:
            raise ConfigError(f"{given.config}: eval_dataset is missing; --dataset or --corpus say what to measure")
        return perplexity.keys_of_run(config, known, Path(given.model or config["output_dir"]), names), corpus
    for option in ("model", "dataset") if given.corpus is None else ("model",):
        if getattr(given, option) is None:
            raise ConfigError(f"--{option} is missing; or --config with a training YAML")
    made = {
        "model_name_or_path": given.model,
        "dataset": ",".join(named(listed(given.dataset), given.corpus)),
        "dataset_dir": given.dataset_dir,
        "stage": given.stage,
        "cutoff_len": given.cutoff_len,
        "finetuning_type": "full" if given.adapter is None else "lora",
        "output_dir": str(Path(given.model) / perplexity.TRAINING_FILE),
        "disable_gradient_checkpointing": True,
        "bf16": given.bf16,
    }
    optional = {"adapter_name_or_path": given.adapter, "template": given.template}
    return {**made, **{key: value for key, value in optional.items() if value is not None}}, given.corpus


def named(names: list[str], corpus: str | None) -> list[str]:
    """The names, or all domains of the corpus where there are none. Raises DataError."""
    if names or corpus is None:
        return names
    return list(manifest.read(corpus, "--corpus").names)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure with a progress bar -> perplexity.summary. Raises UserError."""
    from rich.console import Console
    from rich.progress import Progress

    keys, corpus = keys_of(given)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("perplexity", total=None)
        found = perplexity.measure(
            keys, given.batch_size, lambda done, total: progress.update(task, completed=done, total=total), corpus
        )
    return perplexity.summary(found)


def table(found: dict[str, Any]) -> list[str]:
    """Lines to print."""
    lines = [f"{'data set':<32} {'perplexity':>12} {'loss':>9} {'tokens':>12}"]
    for name, row in {**found["domains"], "overall": found["overall"], "macro": found["macro"]}.items():
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        lines.append(f"{name:<32} {row['perplexity']:>12.4f} {row['loss']:>9.5f} {tokens:>12}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, or 2 after one line that says what is wrong."""
    given = parser().parse_args(argv)
    try:
        found = run(given)
    except UserError as error:
        print(f"eval_perplexity: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(found)))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        write_beside(given.output, json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
