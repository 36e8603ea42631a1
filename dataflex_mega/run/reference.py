"""Token losses of a reference model for the pool of a run: found, built when they are not there, checked."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataflex_mega.distributed.agreement import on_main
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.store.files import MANIFEST
from dataflex_mega.store.reference import ReferenceCache, model_fingerprint
from dataflex_mega.types import Batch, NeedsReference

if TYPE_CHECKING:
    from dataflex_mega.run.build import Opened

FOLDER = "reference"  # in output_dir, when `reference_cache` names none


def find(run: Opened) -> ReferenceCache | None:
    """The cache that a run reads, not yet built or checked; None when no algorithm of the run asks for it.

    Raises ConfigError when one does and neither key is set, and CheckpointError when neither a model nor a cache is there.
    """
    roles = (run.roles.selector, run.scoring, run.roles.mixer, run.roles.weighter)
    if not any(isinstance(role, NeedsReference) for role in roles):
        if run.ours.reference_model or run.ours.reference_cache:
            run.say("note: reference_model and reference_cache are not used: no algorithm of this run asks for them")
        return None
    if run.ours.reference_model is None and run.ours.reference_cache is None:
        names = ", ".join(f"{kind} {spec['name']}" for kind, spec in run.specs.items())
        raise ConfigError(
            f"reference_model: missing; {names} compares losses with those of a reference model: set reference_model (a "
            "Hugging Face folder) or reference_cache (a folder that `dataflex-cli reference` wrote)"
        )
    return cache_of(run)


def cache_of(run: Opened) -> ReferenceCache:
    """The cache that a configuration names, whatever its state."""
    model = run.ours.reference_model
    folder = Path(run.ours.reference_cache or run.output / FOLDER).expanduser()
    source = None if model is None else Path(model).expanduser()
    identity = {
        "model": on_main(run, partial(_model_of, source, folder)),
        "data": on_main(run, run.pool.content),
        "cutoff_len": run.args.data.cutoff_len,
    }
    return ReferenceCache(folder, identity, len(run.pool), run.ours.reference_dtype)


def ensure(run: Opened, cache: ReferenceCache) -> None:
    """Build what is missing, and check every block, the work divided over ranks. Raises CheckpointError for a cache that is
    another model's or data's, that cannot be finished without reference_model, or that is damaged."""
    if not on_main(run, cache.complete):
        if run.ours.reference_model is None:
            raise CheckpointError(f"reference_cache: {cache.folder} is not finished; set reference_model to finish it")
        build(run, cache, Path(run.ours.reference_model).expanduser())
    shares = run.ranks.gather_objects(cache.faults(run.mesh.rank, run.mesh.world))
    faults = [fault for share in shares for fault in share]
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise CheckpointError(f"reference_cache: {faults[0]}{more}; remove {cache.folder} to build it again")


def _model_of(source: Path | None, folder: Path) -> str:
    """The fingerprint of the reference model; without one, of the model that the cache says it was made with."""
    if source is not None:
        if not (source / "config.json").is_file():
            raise ConfigError(f"reference_model: {source} is not a Hugging Face folder (no config.json)")
        return model_fingerprint(source)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"reference_cache: {folder} has no {MANIFEST}; set reference_model to build it there")
    try:
        return str(json.loads(manifest.read_text())["identity"]["model"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"reference_cache: {manifest} cannot be read: {error}") from error


# -- building ------------------------------------------------------------------------------------------------------------


def build(run: Opened, cache: ReferenceCache, source: Path) -> None:
    """Compute the blocks that are missing; rank r takes every world-th of them. The run's random numbers are untouched."""
    on_main(run, cache.begin)
    missing = on_main(run, cache.missing)
    devices = [run.mesh.device] if run.mesh.device.type == "cuda" else []
    run.say(f"reference: {len(missing)} of {cache.blocks} blocks to compute with {source} into {cache.folder}")
    with torch.random.fork_rng(devices):
        losses = forward(run, source)
        for done in range(0, len(missing), run.mesh.world):
            _turn(run, cache, missing[done : done + run.mesh.world], losses)
            run.say(f"reference: {min(done + run.mesh.world, len(missing))}/{len(missing)} blocks")
        del losses
        gc.collect()
        if devices:
            torch.cuda.empty_cache()
    run.ranks.barrier()
    on_main(run, cache.finish)


def _turn(run: Opened, cache: ReferenceCache, blocks: list[int], losses: Callable[[Batch], Tensor]) -> None:
    """One block a rank. A rank without one computes the first once more and drops it: sharded layers are called together."""
    has_one = run.mesh.rank < len(blocks)
    ids = cache.ids(blocks[run.mesh.rank if has_one else 0])
    longest = max(len(cache.ids(block)) for block in blocks)
    size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
    collate = partial(run.collate, pack_length=None)
    found: list[Tensor] = []
    for start in range(0, longest, size):
        here = ids[start : start + size]
        samples = run.pool.fetch(here if len(here) else ids[:1])
        rows = losses(collate([replace(sample, reference=None) for sample in samples]))
        found += [row[: len(sample.input_ids)] for row, sample in zip(rows, samples, strict=True)][: len(here)]
    if has_one:
        cache.write(blocks[run.mesh.rank], found)


def forward(run: Opened, source: Path) -> Callable[[Batch], Tensor]:
    """The reference model as a function: [b, S] token losses on the CPU, float32, no gradient.

    It is laid out as the training model is where that is sharded, and whole on every process otherwise.
    """
    from dataflex_mega.engines.fsdp.engine import FSDPEngine, Options
    from dataflex_mega.engines.fsdp.parallel import parallelize, read_layout

    layout = read_layout(run.config.lf, run.mesh)
    if layout.mode == "ddp":
        layout = replace(layout, mode="single")  # nothing is trained, so nothing is reduced
    model = _load(run, source, layout.dtype)
    module = parallelize(model, layout, run.mesh)
    unused = torch.optim.SGD(module.parameters(), lr=0.0)  # an engine has one; no step is taken
    constant = torch.optim.lr_scheduler.ConstantLR(unused, 1.0)
    engine = FSDPEngine(module, unused, constant, run.mesh, layout, Options(domains=len(run.pool.sizes)))
    engine.module.eval()

    def losses(batch: Batch) -> Tensor:
        with torch.no_grad():
            return engine.token_losses(batch.to(run.mesh.device)).cpu()

    return losses


def _load(run: Opened, source: Path, dtype: torch.dtype) -> Any:
    """The model in the precision that the run computes in. Raises ConfigError when its tokens are not the run's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = run.tokenizer_module["tokenizer"]
    trust = bool(run.args.model.trust_remote_code)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust)
    except (ValueError, OSError) as error:
        raise ConfigError(f"reference_model: {source}: {str(error).strip().splitlines()[0]}") from error
    entries = model.get_input_embeddings().weight.shape[0]
    if entries < len(tokenizer):
        raise ConfigError(
            f"reference_model: {source} knows {entries} tokens, the tokenizer of this run {len(tokenizer)}"
        )
    if (source / "tokenizer.json").is_file():
        theirs = AutoTokenizer.from_pretrained(source, trust_remote_code=trust).get_vocab()
        ours = tokenizer.get_vocab()
        for token in sorted(set(theirs) & set(ours)):
            if theirs[token] != ours[token]:
                found = f"{token!r} is token {theirs[token]} there and {ours[token]} here"
                raise ConfigError(f"reference_model: {source} has another tokenizer than this run: {found}")
    return model
