"""A gradient store for a run: found, built or continued, read. Every process takes part in all of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.lockstep import lockstep_batches
from dataflex_mega.distributed.agreement import run_and_agree, run_on_main
from dataflex_mega.engines.base import Engine, FeatureMaker
from dataflex_mega.progress import ProgressCounter
from dataflex_mega.store import build, search
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout
from dataflex_mega.store.manifest import MANIFEST
from dataflex_mega.types import Batch, ProjectionSpec, UsesStore

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build, Opened
    from dataflex_mega.signals.computer import Provider, SignalComputer

FOLDER = "gradient_store"  # in output_dir, when the selector names none


@dataclass
class Features:
    """Gradient features of a run's samples, with the model of now. Every rank makes one."""

    run: Opened
    engine: Engine
    spec: ProjectionSpec
    maker: FeatureMaker
    collate: Callable[..., Batch]  # one sample a row
    batch_size: int

    @classmethod
    def of(cls, run: Opened, engine: Engine, spec: ProjectionSpec, adam: bool) -> Features:
        """Raises ConfigError where the engine or the optimizer cannot give them."""
        size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
        maker = engine.feature_maker(spec, adam)
        return cls(run, engine, spec, maker, partial(run.collate, pack_length=None), size)

    def identity(self) -> dict[str, Any]:
        """What the features belong to, plain values by name."""
        spec = self.spec
        return {
            "model": self.maker.fingerprint(),
            "data": run_on_main(self.run.collectives, self.run.pool.content_hash),
            "cutoff_len": self.run.args.data.cutoff_len,
            "gradient": "adam" if self.maker.adam else "sgd",
            "projection": {"kind": spec.kind, "size": spec.size, "seed": spec.seed},
        }

    def layout(self, block: int) -> StoreLayout:
        """Of a store that is begun now, in blocks of so many samples: a shard a process."""
        block = min(block, len(self.run.pool))
        return StoreLayout(len(self.run.pool), self.maker.width, self.run.parallel_info.dp_size, block)

    def rows(self, ids: np.ndarray, calls: int) -> Tensor:
        """[n] global ids -> [n, width], in `calls` batches; equally many on every rank."""
        rows = []
        for batch_ids, count in lockstep_batches(ids, self.batch_size, calls):
            rows.append(self.maker.features(self.collate(self.run.pool.fetch(batch_ids))).cpu()[:count])
        return torch.cat(rows)

    def directions(self, groups: Sequence[Sequence[Batch]]) -> Tensor:
        """Groups of this rank's target batches -> [S, width]: the mean over all ranks of the targets' features, each with
        length 1. Rows without a target token count for nothing."""
        made = []
        for batches in groups:
            total, count = torch.zeros(self.maker.width), torch.zeros(())
            for batch in batches:
                found = self.maker.features(batch, plain=True).cpu().float()
                length = found.norm(dim=1, keepdim=True)
                total += torch.where(length > 0, found / length, 0.0).sum(0)
                count += (length > 0).sum()
            made.append(self.run.collectives.all_reduce_sum(total) / self.run.collectives.all_reduce_sum(count).clamp(min=1))
        return torch.stack(made)


def place_of(run: Opened, selector: UsesStore, identity: Mapping[str, Any]) -> Path:
    """The folder of the store of a model: its first digits, in the folder that the selector names."""
    base = Path(selector.store_dir or run.output / FOLDER).expanduser()
    return base / f"{identity['gradient']}-{identity['model'][:12]}"


def ensure(features: Features, folder: Path, identity: Mapping[str, Any], block: int) -> GradientStore:
    """The store in `folder`, built to the end when it is not whole. Raises CheckpointError for one of something else."""
    run = features.run
    if not run_on_main(run.collectives, partial(build.is_complete, folder)):
        fill(features, folder, identity, block)
    return run_and_agree(run.collectives, partial(GradientStore, folder, identity))


def fill(features: Features, folder: Path, identity: Mapping[str, Any], block: int) -> None:
    """Compute the blocks that are missing. A shard is written by one process, whichever began it."""
    run = features.run
    layout: StoreLayout = run_on_main(run.collectives, partial(build.create_or_resume, folder, identity, features.layout(block)))
    mine = range(run.parallel_info.dp_rank, layout.num_shards, run.parallel_info.dp_size)
    writers = run_and_agree(run.collectives, lambda: [build.ShardWriter(folder, layout, shard) for shard in mine])
    todo = [(writer, block) for writer in writers for block in writer.missing_blocks]
    counts = run.collectives.all_gather_objects(len(todo))
    calls = -(-min(layout.block_size, layout.num_samples) // features.batch_size)
    count = ProgressCounter(f"gradient store {folder.name}: blocks", sum(counts)) if run.parallel_info.is_main and sum(counts) else None
    try:
        # A rank that has no block left computes block 0 and drops it.
        for turn, (batch, _) in enumerate(lockstep_batches(todo, 1, max(counts), filler=[(None, 0)])):
            writer, number = batch[0]
            rows = features.rows(np.asarray(layout.ids_of_block(number)), calls)
            if writer is not None:
                writer.write(rows)
            if count is not None:
                count(sum(min(turn + 1, each) for each in counts))
    finally:
        for writer in writers:
            writer.close()
    run.collectives.barrier()
    run_on_main(run.collectives, partial(build.finalize, folder, identity, layout))


def verify(run: Opened, store: GradientStore) -> list[str]:
    """What is wrong with a store, the reading divided over processes."""
    shares = run.collectives.all_gather_objects(store.integrity_errors(run.parallel_info.dp_rank, run.parallel_info.dp_size))
    return [fault for share in shares for fault in share]


# -- as a signal ---------------------------------------------------------------------------------------------------------


def provider(adam: bool) -> Callable[[Build, Any, Any], Provider]:
    """For providers.registry: `dot` and `norm2` of candidates from a store of the model of now."""

    def make(run: Build, engine: Any, selector: Any) -> Provider:
        def signals(computer: SignalComputer, ids: np.ndarray) -> dict[str, Tensor]:
            features = Features.of(run, engine, selector.feature_spec(), adam)
            identity = features.identity()
            folder = place_of(run, selector, identity)
            store = ensure(features, folder, identity, selector.store_block)
            directions = features.directions(computer.target_batches())
            dot, norm2 = run_and_agree(run.collectives, partial(search.dot_products_of, store, directions, ids))
            if selector.store_dir is None:
                run_on_main(run.collectives, partial(remove_others, folder))
            return {"dot": dot, "norm2": norm2}

        return signals

    return make


def remove_others(folder: Path) -> None:
    """The stores of former models, beside this one. Nothing but stores is removed."""
    for other in folder.parent.iterdir():
        if other != folder and (other / MANIFEST).is_file():
            shutil.rmtree(other)
