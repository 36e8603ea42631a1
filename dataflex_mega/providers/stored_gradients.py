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

from dataflex_mega.distributed.agreement import on_all, on_main
from dataflex_mega.progress import Count
from dataflex_mega.store import build, search
from dataflex_mega.store.files import MANIFEST
from dataflex_mega.store.gradients import GradientStore
from dataflex_mega.store.layout import StoreLayout
from dataflex_mega.types import Batch, FeatureSpec, UsesStore

if TYPE_CHECKING:
    from dataflex_mega.run.build import Build, Opened
    from dataflex_mega.signals.scorer import Provider, Scorer

FOLDER = "gradient_store"  # in output_dir, when the selector names none


@dataclass
class Features:
    """Gradient features of a run's samples, with the model of now. Every rank makes one."""

    run: Opened
    spec: FeatureSpec
    maker: Any  # engines.fsdp.features.FeatureMaker
    collate: Callable[..., Batch]  # one sample a row
    batch_size: int

    @classmethod
    def of(cls, run: Opened, engine: Any, spec: FeatureSpec, adam: bool) -> Features:
        """Raises ConfigError where the engine or the optimizer cannot give them."""
        size = run.ours.score_batch_size or run.args.training.per_device_eval_batch_size
        maker = run.backend.feature_maker(engine, spec, adam)
        return cls(run, spec, maker, partial(run.collate, pack_length=None), size)

    def identity(self) -> dict[str, Any]:
        """What the features belong to, plain values by name."""
        spec = self.spec
        return {
            "model": self.maker.fingerprint(),
            "data": on_main(self.run, self.run.pool.content),
            "cutoff_len": self.run.args.data.cutoff_len,
            "gradient": "adam" if self.maker.adam else "sgd",
            "projection": {"kind": spec.kind, "size": spec.size, "seed": spec.seed},
        }

    def layout(self, block: int) -> StoreLayout:
        """Of a store that is begun now, in blocks of so many samples: a shard a process."""
        block = min(block, len(self.run.pool))
        return StoreLayout(len(self.run.pool), self.maker.width, self.run.mesh.dp_size, block)

    def rows(self, ids: np.ndarray, calls: int) -> Tensor:
        """[n] global ids -> [n, width], in `calls` batches; equally many on every rank."""
        found = []
        for call in range(calls):
            here = ids[call * self.batch_size : (call + 1) * self.batch_size]
            samples = self.run.pool.fetch(here if len(here) else ids[:1])
            found.append(self.maker.features(self.collate(samples)).cpu()[: len(here)])
        return torch.cat(found)

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
            made.append(self.run.ranks.sum(total) / self.run.ranks.sum(count).clamp(min=1))
        return torch.stack(made)


def place_of(run: Opened, selector: UsesStore, identity: Mapping[str, Any]) -> Path:
    """The folder of the store of a model: its first digits, in the folder that the selector names."""
    base = Path(selector.store_dir or run.output / FOLDER).expanduser()
    return base / f"{identity['gradient']}-{identity['model'][:12]}"


def ensure(features: Features, folder: Path, identity: Mapping[str, Any], block: int) -> GradientStore:
    """The store in `folder`, built to the end when it is not whole. Raises CheckpointError for one of something else."""
    run = features.run
    if not on_main(run, partial(build.is_complete, folder)):
        fill(features, folder, identity, block)
    return on_all(run, partial(GradientStore, folder, identity))


def fill(features: Features, folder: Path, identity: Mapping[str, Any], block: int) -> None:
    """Compute the blocks that are missing. A shard is written by one process, whichever began it."""
    run = features.run
    layout: StoreLayout = on_main(run, partial(build.begin, folder, identity, features.layout(block)))
    mine = range(run.mesh.dp_rank, layout.shards, run.mesh.dp_size)
    writers = on_all(run, lambda: [build.ShardWriter(folder, layout, shard) for shard in mine])
    todo = [(writer, block) for writer in writers for block in writer.missing]
    counts = run.ranks.gather_objects(len(todo))
    calls = -(-min(layout.block, layout.samples) // features.batch_size)
    count = Count(f"gradient store {folder.name}: blocks", sum(counts)) if run.mesh.is_main and sum(counts) else None
    try:
        for turn in range(max(counts)):
            # A rank that has none left computes a block and drops it: sharded layers are called together.
            writer, number = todo[turn] if turn < len(todo) else (None, 0)
            rows = features.rows(np.asarray(layout.samples_of(number)), calls)
            if writer is not None:
                writer.write(rows)
            if count is not None:
                count(sum(min(turn + 1, each) for each in counts))
    finally:
        for writer in writers:
            writer.close()
    run.ranks.barrier()
    on_main(run, partial(build.finish, folder, identity, layout))


def verify(run: Opened, store: GradientStore) -> list[str]:
    """What is wrong with a store, the reading divided over processes."""
    shares = run.ranks.gather_objects(store.faults(run.mesh.dp_rank, run.mesh.dp_size))
    return [fault for share in shares for fault in share]


# -- as a signal ---------------------------------------------------------------------------------------------------------


def provider(adam: bool) -> Callable[[Build, Any, Any], Provider]:
    """For providers.registry: `dot` and `norm2` of candidates from a store of the model of now."""

    def make(run: Build, engine: Any, selector: Any) -> Provider:
        def signals(scorer: Scorer, ids: np.ndarray) -> dict[str, Tensor]:
            features = Features.of(run, engine, selector.feature_spec(), adam)
            identity = features.identity()
            folder = place_of(run, selector, identity)
            store = ensure(features, folder, identity, selector.store_block)
            directions = features.directions(scorer.target_batches())
            dot, norm2 = on_all(run, partial(search.products_of, store, directions, ids))
            if selector.store_dir is None:
                on_main(run, partial(remove_others, folder))
            return {"dot": dot, "norm2": norm2}

        return signals

    return make


def remove_others(folder: Path) -> None:
    """The stores of former models, beside this one. Nothing but stores is removed."""
    for other in folder.parent.iterdir():
        if other != folder and (other / MANIFEST).is_file():
            shutil.rmtree(other)
