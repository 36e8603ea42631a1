"""`dataflex-cli store build|verify|info|score`: gradient stores by hand.

`python -m dataflex_mega.commands.store ...` runs one of them in this process, alone or under torchrun.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex_mega.commands import _launcher
from dataflex_mega.error_lines import Place
from dataflex_mega.errors import CheckpointError, ConfigError
from dataflex_mega.exit_status import exit_status
from dataflex_mega.files import atomic_file

if TYPE_CHECKING:  # imported where it is used: the help is printed without torch
    from torch import Tensor

    from dataflex_mega.algorithms.requests import StoredGradientSignal
    from dataflex_mega.config.parse import RunConfig
    from dataflex_mega.providers.context import SignalContext
    from dataflex_mega.providers.gradient_features import GradientFeatures
    from dataflex_mega.store.gradients import GradientStore

HELP = """usage: dataflex-cli store build CONFIG.yaml [--folder FOLDER] [key=value ...]
       dataflex-cli store score CONFIG.yaml [--folder FOLDER | --checkpoints A,B,... [--weights X,Y,...]]
                                [--top K] [--output NAME.npy] [key=value ...]
       dataflex-cli store info FOLDER
       dataflex-cli store verify FOLDER

A gradient store holds projected gradients of every sample of a pool, for one state of a model: build once, score against as
many target sets as you like. Training with `selector: {name: less, mode: store}` makes its own; these commands are for
looking at one, for auditing it, and for scoring outside a run.

  build    compute the rows of all samples of `dataset`. CONFIG is a training YAML with that selector; its parameters
           (side, gradient_type, ...) say what is stored. A build that was killed continues after its last complete block.
  score    compare every sample with the samples of `eval_dataset`: LESS's score, the largest over the evaluation sets of the
           mean cosine. Prints the best, and with --output writes all of them, [N] float32 in the order of the pool.
  info     what a store is of, and how large. Reads the manifest only.
  verify   read every byte and compare it with its checksum.

  --folder FOLDER   of the store; a folder of its own under the selector's store_dir when it is left out
  --checkpoints A,B score with several checkpoints, a store each, which `build` has made in folders of their own: for each
                    evaluation set the mean of the cosines by weights, then the largest, as in the paper
  --weights X,Y     of the checkpoints; the learning rate of the step that follows each when they are left out
  --top K           how many of the best to print (default 10)
  --output NAME     where all scores go

The model is that of model_name_or_path, or of a checkpoint: resume_from_checkpoint=OUT/checkpoint-100. A store of another
model, other data or another projection is refused by name.

Work is divided over processes; NPROC_PER_NODE=4 starts four on this machine.

examples:
  dataflex-cli store build run.yaml selector.side=16 resume_from_checkpoint=out/checkpoint-100
  dataflex-cli store score run.yaml resume_from_checkpoint=out/checkpoint-100 --top 20 --output scores.npy
  dataflex-cli store score run.yaml --checkpoints out/checkpoint-100,out/checkpoint-200 --weights 2e-5,1e-5
  dataflex-cli store verify out/gradient_store/adam-0123456789ab"""

COMMANDS = ("build", "score", "info", "verify")
SUMMARY = "store build|score|info|verify  gradient stores for LESS; `store --help` says more"
HELP_ORDER = 30
MODULE = "dataflex_mega.commands.store"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError for what the command does not take."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise ConfigError(f"store: {message}; `dataflex-cli store --help` says more")

    parser = Parser(prog="dataflex-cli store", add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("what")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--checkpoints", type=paths)
    parser.add_argument("--weights", type=numbers)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_intermixed_args(list(argv))
    if options.command in ("info", "verify") and (options.overrides or options.folder or options.output):
        raise ConfigError(f"store {options.command}: takes one folder and nothing else")
    if options.top < 1:
        raise ConfigError(f"store: --top must be at least 1, found {options.top}")
    if options.output is not None and options.output.suffix != ".npy":
        raise ConfigError(f"store: --output must end in .npy, found {options.output}")
    _check_checkpoints(options)
    return options


def paths(text: str) -> list[Path]:
    """The paths of a comma-separated list."""
    return [Path(part) for part in text.split(",") if part]


def numbers(text: str) -> list[float]:
    """Of a list with commas. Raises ValueError for what is none."""
    return [float(part) for part in text.split(",") if part]


def _check_checkpoints(options: argparse.Namespace) -> None:
    checkpoints, weights = options.checkpoints, options.weights
    if checkpoints is None and weights is None:
        return
    if options.command != "score" or not checkpoints:
        raise ConfigError("store: --checkpoints and --weights belong to score, with at least one checkpoint")
    if options.folder is not None or any(word.startswith("resume_from_checkpoint=") for word in options.overrides):
        raise ConfigError(
            "store: --checkpoints names models and by them stores; leave out --folder and resume_from_checkpoint"
        )
    if weights is not None and (
        len(weights) != len(checkpoints) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise ConfigError(
            f"store: --weights must be a number > 0 for each of {len(checkpoints)} checkpoints, found {weights}"
        )


def wants_help(argv: Sequence[str]) -> bool:
    """Whether to print the text above."""
    return not argv or any(word in ("-h", "--help", "help") for word in argv)


def main(argv: Sequence[str]) -> int:
    """Run the command here; `build` and `score` in all processes of torchrun where there are several. -> exit status."""
    if wants_help(argv):
        print(HELP)
        return 0 if argv else 2
    options = parse_arguments(argv)
    if options.command in ("info", "verify") or not _launcher.is_needed():
        return run_here(argv)
    _launcher.check_configuration([options.what, *options.overrides])
    return _launcher.launch(MODULE, list(argv))


def run_here(argv: Sequence[str]) -> int:
    """0 when done; 1 for a store that `verify` finds damaged; see `exit_status` for mistakes."""

    place = Place()

    def action() -> int:
        options = parse_arguments(argv)
        if options.command == "info":
            return info(Path(options.what))
        if options.command == "verify":
            return verify(Path(options.what))
        return on_run(options, place)

    return exit_status(action, place=place)


# -- a folder alone ------------------------------------------------------------------------------------------------------


def info(folder: Path) -> int:
    """Print what a store is of."""
    from dataflex_mega.store.gradients import GradientStore

    store = GradientStore(folder)
    layout = store.layout
    size = sum(layout.shard_bytes(shard) for shard in range(layout.num_shards))
    print(f"{folder}: {layout.num_samples} samples x {layout.width} numbers, bfloat16, {size / 2**20:.1f} MiB")
    print(f"shards: {layout.num_shards}, blocks: {layout.num_blocks} of {layout.block_size} samples")
    for name, value in store.identity.items():
        print(f"{name}: {json.dumps(value) if isinstance(value, dict) else value}")
    return 0


def verify(folder: Path) -> int:
    """Read a store whole. 1 when something is wrong, each fault on a line."""
    from dataflex_mega.progress import ProgressCounter
    from dataflex_mega.store.gradients import GradientStore

    store = GradientStore(folder)
    blocks, faults = store.layout.num_blocks, []
    count = ProgressCounter(f"verify {folder.name}: blocks", blocks)
    for block in range(blocks):
        faults += store.integrity_errors(block, blocks)
        count(block + 1)
    for fault in dict.fromkeys(faults):
        print(fault)
    if not faults:
        print(f"{folder}: {blocks} blocks, {store.layout.num_samples} samples, all as they were written")
    return 1 if faults else 0


# -- a run ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreRun:
    """The features of a run's model and the request of its selector."""

    features: GradientFeatures
    request: StoredGradientSignal

    @property
    def context(self) -> SignalContext:
        """The signal context of `features`: pool, evaluation sets, processes."""
        return self.features.context

    @property
    def engine(self) -> Any:
        """The engine of `context`, with the model."""
        return self.context.engine

    def folder(self, folder: Path | None, identity: dict[str, Any]) -> Path:
        """Where the store is: `folder`, else one of its own under the selector's store_dir."""
        from dataflex_mega.providers.stored_gradients import store_path

        return folder or store_path(self.context, self.request, identity)


def on_run(options: argparse.Namespace, place: Place | None = None) -> int:
    """`build` and `score`. Raises UserError."""
    from dataflex_mega.commands._configuration import read_dynamic_config
    from dataflex_mega.distributed.parallel_info import shutdown_distributed
    from dataflex_mega.distributed.peers import NamedPeers

    without_role = "store: the configuration has no selector; it must have one with a store, such as less"
    config = read_dynamic_config(options.what, options.overrides, without_role, place)
    finished = False
    try:
        with NamedPeers():
            _build_or_score(config, options)
        gc.collect()  # the model's wrappers hold the process group, which must not end inside them
        finished = True
    finally:
        shutdown_distributed(orderly=finished)
    return 0


def _build_or_score(config: RunConfig, options: argparse.Namespace) -> None:
    run = open_store_run(config, bool(options.checkpoints))
    if options.command == "build":
        build(run, options.folder)
    else:
        score(run, options)


def open_store_run(config: RunConfig, several: bool = False) -> StoreRun:
    """Build the model and its features; with `several` checkpoints, before one is loaded.

    Raises ConfigError for a selector without a store.
    """
    from dataflex_mega.algorithms.requests import StoredGradientSignal, requests_of
    from dataflex_mega.providers.gradient_features import GradientFeatures
    from dataflex_mega.run.data import RunData
    from dataflex_mega.run.roles import RunRoles
    from dataflex_mega.run.session import Session

    roles = RunRoles.from_config(config)
    session = Session.start(config)
    data = RunData.load(session, roles)
    selector = roles.algorithms.selector
    requests = requests_of(selector, StoredGradientSignal)
    if not requests:
        name = roles.specs["selector"]["name"] if "selector" in roles.specs else "none"
        raise ConfigError(f"store: selector {name} uses no store here; less does, with selector.mode: store")
    engine = session.engine_builder.build_engine(session.tokenizer, len(data.pool.sizes), 1, {})
    checkpoint = None if several else config.llamafactory.get("resume_from_checkpoint")
    if checkpoint:
        load_checkpoint(engine, Path(str(checkpoint)))
    elif requests[0].adam and not several:
        session.report("note: without resume_from_checkpoint Adam's moments are zero, as before the first step")
    context = data.signal_context(session, engine)
    return StoreRun(GradientFeatures(context, requests[0].projection, requests[0].adam), requests[0])


def load_checkpoint(engine: Any, path: Path) -> None:
    """Load parameters and moments of a checkpoint, every file hashed. Raises CheckpointError when it is none or damaged."""
    from dataflex_mega.checkpoint_format import Damaged, Manifest  # imports torch

    try:
        manifest = Manifest.read(path)
        faults = manifest.faults(path, sorted(manifest.files))
    except Damaged as damage:
        faults = [str(damage)]
    if faults:
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a whole checkpoint of dataflex_mega: {faults[0]}")
    engine.load_state(path / "engine")


def build(run: StoreRun, folder: Path | None) -> None:
    """Build a store, or continue one."""
    from dataflex_mega.providers.stored_gradients import open_or_build

    identity = run.features.identity()
    path = run.folder(folder, identity)
    store = open_or_build(run.features, path, identity, run.request.block_size)
    run.context.report(f"store: {store.layout.num_samples} samples x {store.layout.width} numbers in {path}")


def score(run: StoreRun, options: argparse.Namespace) -> None:
    """Compare all samples with the targets: each rank its share, then the best of all ranks."""
    import numpy as np

    from dataflex_mega.store import search

    context = run.context
    info, collectives = context.parallel_info, context.collectives
    scores, counts = (
        score_with_checkpoints(run, options) if options.checkpoints else score_with_model(run, options.folder)
    )
    ids, best = search.top_k(scores, info.dp_rank, counts, min(options.top, sum(counts)), collectives)
    if options.output is not None:
        all_scores = collectives.all_gather_uneven(scores, counts)
        if info.is_main:
            with atomic_file(options.output) as stream:
                np.save(stream, all_scores.numpy())
    if info.is_main:
        for number, value in zip(ids.tolist(), best.tolist(), strict=True):
            print(f"{value:+.4f}  {number}  {context.pool.describe(number)}")


def open_store(run: StoreRun, folder: Path | None) -> tuple[GradientStore, Tensor]:
    """(the store of the current model, its directions [S, width])."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.store.gradients import GradientStore

    identity = run.features.identity()
    store = run_and_agree(run.context.collectives, partial(GradientStore, run.folder(folder, identity), identity))
    return store, run.features.directions(run.context.target_batches(run.context.target_groups()))


def score_with_model(run: StoreRun, folder: Path | None) -> tuple[Tensor, list[int]]:
    """([n] scores of this rank's samples, number of samples of each rank)."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.store import search

    store, directions = open_store(run, folder)
    dp_rank, dp_size = run.context.parallel_info.dp_rank, run.context.parallel_info.dp_size
    compare = partial(search.streamed_max_cosine, store, directions, dp_rank, dp_size)
    return run_and_agree(run.context.collectives, compare), search.rank_counts(store, dp_size)


def score_with_checkpoints(run: StoreRun, options: argparse.Namespace) -> tuple[Tensor, list[int]]:
    """The same over checkpoints: the largest, over evaluation sets, of the weighted mean of the cosines."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.store import search

    dp_rank, dp_size = run.context.parallel_info.dp_rank, run.context.parallel_info.dp_size
    total: Any = 0.0  # [n, S]
    weight_sum, counts = 0.0, None
    for number, checkpoint in enumerate(options.checkpoints):
        load_checkpoint(run.engine, checkpoint)
        run.features.maker.refresh()
        weight = options.weights[number] if options.weights else run.engine.learning_rate()
        if weight <= 0:
            raise ConfigError(f"store: the learning rate after {checkpoint} is {weight}; set --weights")
        run.context.report(f"{checkpoint}: weight {weight:g}")
        store, directions = open_store(run, None)
        if counts is not None and search.rank_counts(store, dp_size) != counts:
            raise CheckpointError(f"store: {store.folder} has blocks of another size than the stores before it")
        counts = search.rank_counts(store, dp_size)
        compare = partial(search.dot_products, store, directions, dp_rank, dp_size)
        dot, norm2 = run_and_agree(run.context.collectives, compare)
        total = total + weight * search.cosine_matrix(dot, norm2).double()
        weight_sum += weight
    assert counts is not None, "there is a checkpoint"
    return (total / weight_sum).max(dim=1).values.float(), counts


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
