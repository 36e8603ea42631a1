"""The keys `corpus_dir` and `eval_corpus_dir`: what they change of LLaMA-Factory's keys, and what contradicts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex_mega.config.dataflex_arguments import RunArguments
from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import CorpusDomain
from dataflex_mega.errors import ConfigError

KEYS = ("corpus_dir", "eval_corpus_dir")
FULL = "rows of a corpus are always full"
# Key of LLaMA-Factory -> why it has no effect beside corpus_dir.
UNUSED_WITH_CORPUS = {
    "dataset_dir": "the domains are in corpus_dir",
    "tokenized_path": "a corpus is tokenized already",
    "streaming": "a corpus is read row by row from its files",
    "val_size": "a corpus is not split; evaluation sets are the domains of eval_corpus_dir",
    "max_samples": "max_steps and the proportions say how much is drawn",
    "packing": FULL,
    "neat_packing": FULL,
}


def check_engine(arguments: RunArguments, engine: str) -> None:
    """Raises ConfigError for a corpus in a run that LLaMA-Factory itself would do: it cannot read one."""
    for key in KEYS:
        if getattr(arguments, key) is not None and arguments.train_type == "static" and engine == "fsdp":
            raise ConfigError(
                f"{key}: has no effect with train_type: static, since LLaMA-Factory cannot read .bin/.idx; "
                "mixer: static trains on it in fixed proportions"
            )


def check_corpora(
    arguments: RunArguments, lf_values: dict[str, Any], names: Sequence[str], eval_names: Sequence[str]
) -> None:
    """Raises ConfigError or DataError for a corpus that is not there, a domain it has not, and keys that contradict it.

    Args:
        arguments: our keys.
        lf_values: LLaMA-Factory's keys and their values.
        names: of `dataset`.
        eval_names: of `eval_dataset`.
    """
    if arguments.corpus_dir is None:
        if arguments.eval_corpus_dir is not None:
            raise ConfigError("eval_corpus_dir: needs corpus_dir; without one, eval_dataset names evaluation sets")
        return
    stage = lf_values.get("stage", "sft")
    if stage != "pt":
        raise ConfigError(f"corpus_dir: a corpus is for stage: pt, found stage: {stage}")
    if lf_values.get("cutoff_len", 2048) < 2:
        raise ConfigError(f"cutoff_len: a row needs at least 2 tokens, found {lf_values['cutoff_len']}")
    for key, why in UNUSED_WITH_CORPUS.items():
        if lf_values.get(key) not in (None, 0):  # False too: packing: false asks for something else
            raise ConfigError(f"{key}: has no effect with corpus_dir; {why}; leave it out")
    if lf_values.get("packing") is False:
        raise ConfigError(f"packing: has no effect with corpus_dir; {FULL}; leave it out")
    if eval_names and arguments.eval_corpus_dir is None:
        raise ConfigError("eval_dataset: with corpus_dir it names domains of eval_corpus_dir, which is missing")
    training_domains(arguments, names)
    if arguments.eval_corpus_dir is not None:
        manifest.read(arguments.eval_corpus_dir, "eval_corpus_dir").pick(eval_names, "eval_dataset")


def training_domains(arguments: RunArguments, names: Sequence[str]) -> tuple[CorpusDomain, ...]:
    """The domains that a run on a corpus trains on; none when `corpus_dir` is not set. Raises DataError."""
    if arguments.corpus_dir is None:
        return ()
    return manifest.read(arguments.corpus_dir).pick(names)


def with_names(
    arguments: RunArguments, lf_values: dict[str, Any], names: Sequence[str], eval_names: Sequence[str]
) -> dict[str, Any]:
    """LLaMA-Factory's keys with `dataset` and `eval_dataset` filled in: its parser wants them to train and evaluate."""
    if arguments.corpus_dir is None:
        return lf_values
    filled = {**lf_values, "dataset": [domain.name for domain in training_domains(arguments, names)]}
    if arguments.eval_corpus_dir is not None:
        held_out = manifest.read(arguments.eval_corpus_dir, "eval_corpus_dir").pick(eval_names, "eval_dataset")
        filled["eval_dataset"] = [domain.name for domain in held_out]
    return filled
