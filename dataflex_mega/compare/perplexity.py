"""Held-out perplexity of a checkpoint in Hugging Face layout, by domain and overall.

The windows are those that training evaluates: LLaMA-Factory tokenizes, and for pre-training packs the text into rows of
`cutoff_len` tokens; or they are those of a corpus. A row of S tokens has S - 1 targets. Perplexity is exp of the mean loss
of all targets of a domain; overall it is exp of the mean over all targets of all domains, macro it is exp of the
unweighted mean of the domains' losses, which is the geometric mean of their perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataflex_mega import objective
from dataflex_mega.data.pool import Domain, Pool
from dataflex_mega.errors import ConfigError
from dataflex_mega.types import Batch, SampleObs

ADAPTER = "adapter_config.json"
CORPUS = "eval_corpus_dir"
# What a training YAML says that a model that was trained must not be told again, or that evaluation decides itself.
DROPPED = (
    "train_from_scratch", "resume_from_checkpoint", "overwrite_output_dir", "eval_dataset", "val_size", "deepspeed",
    "plot_loss", "eval_strategy", "eval_steps", "save_strategy", "load_best_model_at_end", "resize_vocab",
    "callbacks", "early_stopping_steps",
)  # fmt: skip
TRAINING_FILE = "perplexity"  # no run writes there, so LLaMA-Factory finds no checkpoint to resume


@dataclass(frozen=True)
class Measured:
    """Sums over the targets of one domain."""

    loss: float
    tokens: int
    samples: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.loss / self.tokens

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "perplexity": math.exp(self.mean),
            "loss": self.mean,
            "tokens": self.tokens,
            "samples": self.samples,
        }


def summary(domains: Mapping[str, Measured]) -> dict[str, Any]:
    """Domain -> sums to {"domains": ..., "overall": ..., "macro": ...}, ready for JSON."""
    whole = Measured(
        math.fsum(d.loss for d in domains.values()),
        sum(d.tokens for d in domains.values()),
        sum(d.samples for d in domains.values()),
    )
    mean = math.fsum(d.mean for d in domains.values()) / len(domains)
    return {
        "domains": {name: measured.as_dict() for name, measured in domains.items()},
        "overall": whole.as_dict(),
        "macro": {"perplexity": math.exp(mean), "loss": mean},
    }


def keys_of_run(
    config: Mapping[str, Any], lf_keys: Mapping[str, str], folder: Path, names: list[str]
) -> dict[str, Any]:
    """A training's configuration -> LLaMA-Factory's keys that evaluate what it left in `folder` on the sets `names`."""
    kept = {key: value for key, value in config.items() if key in lf_keys and key not in DROPPED}
    kept.update(dataset=",".join(names), output_dir=str(folder / TRAINING_FILE), disable_gradient_checkpointing=True)
    if (folder / ADAPTER).is_file():
        kept["adapter_name_or_path"] = str(folder)
    else:
        kept["model_name_or_path"] = str(folder)
        kept["finetuning_type"] = "full"
        kept.pop("adapter_name_or_path", None)
    return kept


def measure(
    keys: Mapping[str, Any],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    corpus: str | None = None,
) -> dict[str, Measured]:
    """Evaluate one model on every data set of `dataset`, each a domain, in this process.

    Args:
        keys: LLaMA-Factory's, as `keys_of_run` makes them. The data is read as `stage`, `template`, `cutoff_len` say.
        batch_size: rows of a forward pass.
        progress: is told (batches done, batches in all).
        corpus: folder of a corpus; `dataset` then names domains of it.

    Raises:
        ConfigError, DataError: naming the key or data set that is wrong.
    """
    from dataflex_mega.llamafactory import args as lf_args
    from dataflex_mega.llamafactory.data import load_data
    from dataflex_mega.llamafactory.model import build_model, load_tokenizer

    if batch_size < 1:
        raise ConfigError(f"batch size: must be at least 1, found {batch_size}")
    parsed = lf_args.parse(lf_args.prepare(dict(keys)))
    module, template = load_tokenizer(parsed)
    if corpus is None:
        pool = Pool(load_data(parsed, module, template).domains)
    else:
        pool = Pool(windows(corpus, module["tokenizer"], parsed.data.dataset or [], int(parsed.data.cutoff_len)))
    model = build_model(parsed, module["tokenizer"]).to(torch.device(parsed.training.device)).eval()
    pad = module["tokenizer"].pad_token_id
    precision = torch.bfloat16 if parsed.training.bf16 else torch.float16 if parsed.training.fp16 else None
    loss, tokens = sums(model, pool, (pad if pad is not None else 0, batch_size, precision), progress)
    for name, count in zip(pool.names, tokens.tolist(), strict=True):
        if count == 0:
            raise ConfigError(f"dataset {name!r}: no target tokens to measure perplexity on")
    return {name: Measured(float(loss[d]), int(tokens[d]), pool.sizes[d]) for d, name in enumerate(pool.names)}


def windows(folder: str, tokenizer: Any, names: Sequence[str], length: int) -> list[Domain]:
    """The domains `names` of a corpus, all without names, as windows of `length` tokens. Raises DataError."""
    from dataflex_mega.data import manifest
    from dataflex_mega.data.windows import window_domain

    corpus = manifest.read(folder, CORPUS)
    manifest.check_tokenizer(corpus, tokenizer, CORPUS)
    return [window_domain(corpus, domain, length, CORPUS) for domain in corpus.pick(names, "eval_dataset")]


def sums(
    model: Any, pool: Any, how: tuple[int, int, torch.dtype | None], progress: Callable[[int, int], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """([k] float64 loss sums, [k] float64 targets) of a causal Hugging Face model on a pool of k domains.

    `how`: (padding token, rows of a batch, autocast precision or None).
    """
    from dataflex_mega.data.collate import collate
    from dataflex_mega.signals.scorer import Scorer, evaluate

    pad, size, precision = how
    batches, done = -(-len(pool) // size), 0

    def forward(batch: Batch) -> SampleObs:
        nonlocal done
        observed = observe(model, batch, precision)
        done += 1
        if progress is not None:
            progress(done, batches)
        return observed

    return evaluate(Scorer(pool, partial(collate, pad_id=pad), forward, size, rank=0, ranks=1))


@torch.inference_mode()
def observe(model: Any, batch: Batch, precision: torch.dtype | None) -> SampleObs:
    """Losses of the samples of one batch, one sample a row. Rows are padded on the right, which causal attention hides."""
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, dtype=precision, enabled=precision is not None):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return objective.observe(objective.sample_sums(objective.token_losses(logits, batch.labels), batch), batch)
