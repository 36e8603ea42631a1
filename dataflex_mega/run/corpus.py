"""A run on a corpus: its domains and evaluation sets in place of LLaMA-Factory's datasets."""

from __future__ import annotations

from typing import Any

from dataflex_mega.config.checks import split_names
from dataflex_mega.config.corpus import with_names
from dataflex_mega.config.parse import RunConfig
from dataflex_mega.data import manifest
from dataflex_mega.data.fixed_length import FixedLengthRows, fixed_length_domain
from dataflex_mega.data.pool import Domain, RowSource
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.data import DataBundle


def lf_keys(config: RunConfig) -> dict[str, Any]:
    """LLaMA-Factory's keys of a run; beside corpus_dir, names of domains are filled in where they are left out."""
    names, eval_names = (
        split_names(config.llamafactory.get("dataset")),
        split_names(config.llamafactory.get("eval_dataset")),
    )
    return with_names(config.dataflex, config.llamafactory, names, eval_names)


def load(config: RunConfig, args: LFArgs, tokenizer: Any) -> tuple[DataBundle, list[str]]:
    """Rows of `cutoff_len` tokens of the domains of `corpus_dir` and `eval_corpus_dir` -> (them, notes).

    Raises DataError for a corpus of another tokenizer, damaged files, or a domain that fills no row.
    """
    assert config.dataflex.corpus_dir is not None
    train, notes = _domains(config, args, tokenizer, "corpus_dir", "dataset")
    evaluation: dict[str, RowSource] = {}
    if config.dataflex.eval_corpus_dir is not None:
        held_out, more = _domains(config, args, tokenizer, "eval_corpus_dir", "eval_dataset")
        evaluation = {domain.name: domain.rows for domain in held_out}
        notes += more
    return DataBundle(train, evaluation), notes


def _domains(
    config: RunConfig, args: LFArgs, tokenizer: Any, key: str, names_key: str
) -> tuple[list[Domain], list[str]]:
    """The domains of the corpus that `key` names, those of the key `names_key`, and what to say of them."""
    corpus = manifest.read(getattr(config.dataflex, key), key)
    manifest.check_tokenizer(corpus, tokenizer, key)
    length = int(args.data.cutoff_len)
    found = [
        fixed_length_domain(corpus, entry, length, key)
        for entry in corpus.pick(split_names(config.llamafactory.get(names_key)), names_key)
    ]
    rows = [domain.rows for domain in found if isinstance(domain.rows, FixedLengthRows)]
    num_rows, tokens, dropped = (sum(part) for part in zip(*((len(r), r.tokens, r.dropped) for r in rows), strict=True))
    note = (
        f"{key}: {len(found)} domains, {tokens:,} tokens, {num_rows:,} rows of {length} tokens; "
        f"{dropped:,} tokens at the ends fill no row"
    )
    return found, [note]
