"""Held-out perplexity of a checkpoint in Hugging Face layout, by domain and overall.

The rows are the ones that training evaluates: LLaMA-Factory tokenizes, and for pre-training packs the text into rows of
`cutoff_len` tokens; or they are the rows of a corpus. A row of S tokens has S - 1 targets. The perplexity of a domain is
exp of the mean loss of its targets; `overall` is exp of the mean over the targets of all domains; `macro` is exp of the
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

import dataflex_mega.objective as objective
from dataflex_mega.data import manifest
from dataflex_mega.data.collate import collate
from dataflex_mega.data.fixed_length import fixed_length_domain
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory import args as lf_args
from dataflex_mega.llamafactory.data import load_data
from dataflex_mega.llamafactory.model import build_model, load_tokenizer
from dataflex_mega.llamafactory.model_checks import check_model
from dataflex_mega.signals import pool_share
from dataflex_mega.types import Batch, SampleStats

ADAPTER = "adapter_config.json"
CORPUS = "eval_corpus_dir"
# Keys of a training YAML that do not apply to the trained model, or that evaluation sets itself.
TRAINING_ONLY_KEYS = (
    "train_from_scratch", "resume_from_checkpoint", "overwrite_output_dir", "eval_dataset", "val_size", "deepspeed",
    "plot_loss", "eval_strategy", "eval_steps", "save_strategy", "load_best_model_at_end", "resize_vocab",
    "callbacks", "early_stopping_steps", "tokenized_path", "interleave_probs", "mix_strategy", "streaming", "buffer_size",
)  # fmt: skip
TRAINING_FILE = "perplexity"  # no run writes there, so LLaMA-Factory finds no checkpoint to resume from


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over the targets of one domain."""

    loss_sum: float
    num_tokens: int
    num_samples: int

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.num_tokens

    def as_dict(self) -> dict[str, float]:
        """Plain values, ready for JSON."""
        return {
            "perplexity": math.exp(self.mean_loss),
            "loss": self.mean_loss,
            "tokens": self.num_tokens,
            "samples": self.num_samples,
        }


def summary(domains: Mapping[str, EvaluationSums]) -> dict[str, Any]:
    """Domain -> sums to {"domains": ..., "overall": ..., "macro": ...}, ready for JSON."""
    overall = EvaluationSums(
        math.fsum(d.loss_sum for d in domains.values()),
        sum(d.num_tokens for d in domains.values()),
        sum(d.num_samples for d in domains.values()),
    )
    mean = math.fsum(d.mean_loss for d in domains.values()) / len(domains)
    return {
        "domains": {name: sums.as_dict() for name, sums in domains.items()},
        "overall": overall.as_dict(),
        "macro": {"perplexity": math.exp(mean), "loss": mean},
    }


def evaluation_keys(
    config: Mapping[str, Any], lf_keys: Mapping[str, str], folder: Path, names: list[str]
) -> dict[str, Any]:
    """A training's configuration -> LLaMA-Factory's keys that evaluate the model in `folder` on the data sets `names`."""
    keys = {key: value for key, value in config.items() if key in lf_keys and key not in TRAINING_ONLY_KEYS}
    keys.update(dataset=",".join(names), output_dir=str(folder / TRAINING_FILE), disable_gradient_checkpointing=True)
    if (folder / ADAPTER).is_file():
        keys["adapter_name_or_path"] = str(folder)
    else:
        keys["model_name_or_path"] = str(folder)
        keys["finetuning_type"] = "full"
        keys.pop("adapter_name_or_path", None)
    return keys


def check_stage(keys: Mapping[str, Any]) -> None:
    """Raises ConfigError for a stage whose rows have no perplexity."""
    if keys.get("stage") == "dpo":
        raise ConfigError("stage: dpo: pairs of answers have no perplexity; measure on rows of stage sft or pt instead")


def evaluate(
    keys: Mapping[str, Any],
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    corpus: str | None = None,
) -> dict[str, EvaluationSums]:
    """Evaluate one model on every data set of `dataset`, each a domain, in this process.

    Args:
        keys: LLaMA-Factory's, as `evaluation_keys` returns them. The data is read as `stage`, `template`, `cutoff_len` say.
        batch_size: rows of a forward pass.
        progress: called with (batches done, batches in all).
        corpus: folder of a corpus; `dataset` then names domains of it.

    Raises:
        ConfigError, DataError: with the name of the wrong key or data set.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size: must be at least 1, found {batch_size}")
    check_stage(keys)
    parsed = lf_args.parse_arguments(lf_args.prepare_arguments(dict(keys)))
    module, template = load_tokenizer(parsed)
    check_model(parsed, module["tokenizer"])
    if corpus is None:
        pool = SamplePool(load_data(parsed, module, template).domains)
    else:
        pool = SamplePool(
            corpus_domains(corpus, module["tokenizer"], parsed.data.dataset or [], int(parsed.data.cutoff_len))
        )
    model = build_model(parsed, module["tokenizer"]).to(torch.device(parsed.training.device)).eval()
    pad = module["tokenizer"].pad_token_id
    precision = torch.bfloat16 if parsed.training.bf16 else torch.float16 if parsed.training.fp16 else None
    loss, tokens = domain_sums(model, pool, (pad if pad is not None else 0, batch_size, precision), progress)
    for name, count in zip(pool.names, tokens.tolist(), strict=True):
        if count == 0:
            raise ConfigError(f"dataset {name!r}: no target tokens to measure perplexity on")
    return {name: EvaluationSums(float(loss[d]), int(tokens[d]), pool.sizes[d]) for d, name in enumerate(pool.names)}


def corpus_domains(folder: str, tokenizer: Any, names: Sequence[str], length: int) -> list[Domain]:
    """The domains `names` of a corpus (all of them without names) as rows of `length` tokens. Raises DataError."""
    corpus = manifest.read(folder, CORPUS)
    manifest.check_tokenizer(corpus, tokenizer, CORPUS)
    return [fixed_length_domain(corpus, domain, length, CORPUS) for domain in corpus.pick(names, "eval_dataset")]


def domain_sums(
    model: Any,
    pool: Any,
    batching: tuple[int, int, torch.dtype | None],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([k] float64 loss sums, [k] float64 target counts) of a causal Hugging Face model on a pool of k domains.

    `batching`: (padding token, rows of a batch, autocast precision or None).
    """
    pad, size, precision = batching
    batches, done = -(-len(pool) // size), 0

    def forward(batch: Batch) -> SampleStats:
        nonlocal done
        observed = observe(model, batch, precision)
        done += 1
        if progress is not None:
            progress(done, batches)
        return observed

    return pool_share.evaluate(
        pool_share.PoolShare(pool, size, dp_rank=0, dp_size=1), partial(collate, pad_id=pad), forward
    )


@torch.inference_mode()
def observe(model: Any, batch: Batch, precision: torch.dtype | None) -> SampleStats:
    """Losses of the samples of one batch, one sample per row. Padding is on the right, so causal attention ignores it."""
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, dtype=precision, enabled=precision is not None):
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
    return objective.make_sample_stats(
        objective.sample_sums(objective.token_losses(logits, batch.labels), batch), batch
    )
