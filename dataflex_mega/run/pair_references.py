"""Log-probabilities of the reference model for the pairs of a run: two numbers a pair, computed once and kept.

The reference model is ref_model, or else the model at its start: its base under LoRA, whose adapters are switched off, the
whole of it otherwise. So they are computed with the model of the run, before a checkpoint is loaded into it, and a run that
is resumed reads what was kept. The folder is named by what the numbers follow from, so no other run's are taken for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataflex_mega.data.pairs import NUM_ROWS
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.engines.base import Engine
from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.ref_model import load_ref_model
from dataflex_mega.run import reference
from dataflex_mega.run.data import RunData
from dataflex_mega.run.preference import has_pairs, pair_loss
from dataflex_mega.run.session import Session
from dataflex_mega.store.reference_losses import ReferenceLossCache
from dataflex_mega.types import Batch

HASHED = (".safetensors", ".bin", ".json")  # files of a model that decide what it computes
DIGITS = 16


@dataclass(frozen=True)
class PairReferences:
    """The caches of a run: of its pool, and of each evaluation set by name."""

    of_pool: ReferenceLossCache
    of_evaluation: dict[str, ReferenceLossCache]

    @classmethod
    def find(cls, session: Session, data: RunData) -> PairReferences | None:
        """Not yet built or checked; None for a run whose loss reads none."""
        if not has_pairs(session.args) or not pair_loss(session.args).needs_reference:
            return None
        model = run_on_main(session.collectives, partial(_identity_of_model, session))
        evaluation = {name: _cache(session, pool, model) for name, pool in data.evaluation.items()}
        return cls(_cache(session, data.pool, model), evaluation)

    def attach(self, session: Session, data: RunData, engine: Engine) -> RunData:
        """The data with the numbers beside the samples, computed where they are missing. `engine`: with the model at its
        start, which stays as it is."""
        source = _source(session, engine)

        def with_cache(pool: SamplePool, cache: ReferenceLossCache) -> SamplePool:
            reference.ensure_complete(session, replace(data, pool=pool), cache, source)
            return pool.with_references(cache, NUM_ROWS)

        evaluation = {name: with_cache(pool, self.of_evaluation[name]) for name, pool in data.evaluation.items()}
        return replace(data, pool=with_cache(data.pool, self.of_pool), evaluation=evaluation)


def _cache(session: Session, pool: SamplePool, model: str) -> ReferenceLossCache:
    keys = session.config.dataflex
    identity = {
        "model": model,
        "data": run_on_main(session.collectives, pool.content_hash),
        "cutoff_len": session.args.data.cutoff_len,
        "of": "pairs",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:DIGITS]
    folder = Path(keys.reference_cache or session.output_dir / reference.FOLDER).expanduser() / f"pairs-{digest}"
    return ReferenceLossCache(folder, identity, len(pool), keys.reference_dtype)


def _identity_of_model(session: Session) -> str:
    """A hash of the reference model and of the precision that it computes in."""
    args, precision = session.args, ("bf16", "fp16", "pure_bf16")
    model, tuning = args.model, args.finetuning
    parts: dict[str, Any] = {key: bool(session.config.llamafactory.get(key)) for key in precision}
    parts["model"] = [_content(path) for path in _sources(args)]
    if tuning.ref_model is None:
        parts["base only"] = tuning.finetuning_type == "lora"
        if model.train_from_scratch:
            parts["seed"] = args.training.seed
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _sources(args: LFArgs) -> list[str]:
    """The folders, or names on a hub, that the reference model is read from."""
    if args.finetuning.ref_model is None:
        return [args.model.model_name_or_path, *(args.model.adapter_name_or_path or [])]
    adapters = args.finetuning.ref_model_adapters
    return [args.finetuning.ref_model, *(adapters.split(",") if adapters else [])]


def _content(source: str) -> str:
    """A hash of a folder's files; of a name on a hub the name itself."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return source
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in HASHED and path.is_file()):
        with path.open("rb") as stream:
            sha.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


# -- the model as a function ---------------------------------------------------------------------------------------------


def _source(session: Session, engine: Engine) -> reference.Source:
    name = session.args.finetuning.ref_model
    if name is not None:
        return reference.Source(f"ref_model {name}", partial(_of_other_model, session))
    adapters = session.args.finetuning.finetuning_type == "lora"
    what = "the model without its adapters" if adapters else "the model at its start"
    return reference.Source(what, lambda: partial(_of_run, engine, adapters))


def _of_run(engine: Engine, adapters: bool, batch: Batch) -> Tensor:
    """[n, 2] sums of token losses by the model of the run."""
    with _without_adapters(engine.model) if adapters else contextlib.nullcontext():
        return _row_sums(engine.token_losses(batch))


@contextlib.contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """PEFT's `disable_adapter`, with what is trained left so: FSDP2 looks at that when it gathers a layer first, and would
    take gradients of the adapters in the wrong dtype afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


def _of_other_model(session: Session) -> Callable[[Batch], Tensor]:
    """The same by ref_model, laid out as the training model is where that is sharded, and whole otherwise."""
    layout = read_layout(session.config.llamafactory, session.parallel_info)
    if layout.mode == "ddp":
        layout = replace(layout, mode="single")  # nothing is trained, so nothing is reduced
    model = load_ref_model(session.args, {"": "cpu"} if layout.mode == "fsdp2" else None)
    entries = model.get_input_embeddings().weight.shape[0]
    if entries < len(session.tokenizer):
        name = session.args.finetuning.ref_model
        raise ConfigError(
            f"ref_model: {name} knows {entries} tokens, the tokenizer of this run {len(session.tokenizer)}"
        )
    runner = FSDPModelRunner(parallelize(model, layout, session.parallel_info), layout, session.parallel_info)
    runner.module.eval()

    def sums(batch: Batch) -> Tensor:
        with torch.no_grad():
            return _row_sums(runner.token_losses(batch.to(runner.device)))

    return sums


def _row_sums(token_losses: Tensor) -> Tensor:
    """[2n, S] -> [n, 2] on the CPU: of the chosen and of the rejected answer."""
    return token_losses.sum(dim=1).view(NUM_ROWS, -1).T.cpu()
