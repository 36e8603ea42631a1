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
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.commands import _launcher
from dataflex_mega.commands._status import exit_status
from dataflex_mega.errors import CheckpointError, ConfigError

HELP = """usage: dataflex-cli store build CONFIG.yaml [--folder FOLDER] [key=value ...]
       dataflex-cli store score CONFIG.yaml [--folder FOLDER | --checkpoints A,B,... [--weights X,Y,...]]
                                [--top K] [--output NAME.npy] [key=value ...]
       dataflex-cli store info FOLDER
       dataflex-cli store verify FOLDER

A gradient store holds projected gradients of every sample of a pool, for one state of a model: build once, score against as
many target sets as you like. Training with `selector: {name: less, mode: store}` makes its own; these commands are for
looking at one, for auditing it, and for scoring outside a run.

  build    compute the rows of all samples of `dataset`. CONFIG is a training YAML with that selector; its parameters
           (side, gradient_type, ...) say what is stored. A build that was killed goes on after its last whole block.
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
    found = parser.parse_intermixed_args(list(argv))
    if found.command in ("info", "verify") and (found.overrides or found.folder or found.output):
        raise ConfigError(f"store {found.command}: takes one folder and nothing else")
    if found.top < 1:
        raise ConfigError(f"store: --top must be at least 1, found {found.top}")
    if found.output is not None and found.output.suffix != ".npy":
        raise ConfigError(f"store: --output must end in .npy, found {found.output}")
    _check_checkpoints(found)
    return found


def paths(text: str) -> list[Path]:
    """Of a list with commas."""
    return [Path(part) for part in text.split(",") if part]


def numbers(text: str) -> list[float]:
    """Of a list with commas. Raises ValueError for what is none."""
    return [float(part) for part in text.split(",") if part]


def _check_checkpoints(found: argparse.Namespace) -> None:
    given, weights = found.checkpoints, found.weights
    if given is None and weights is None:
        return
    if found.command != "score" or not given:
        raise ConfigError("store: --checkpoints and --weights belong to score, with at least one checkpoint")
    if found.folder is not None or any(word.startswith("resume_from_checkpoint=") for word in found.overrides):
        raise ConfigError(
            "store: --checkpoints names models and by them stores; leave out --folder and resume_from_checkpoint"
        )
    if weights is not None and (len(weights) != len(given) or not all(0 < weight < math.inf for weight in weights)):
        raise ConfigError(
            f"store: --weights must be a number > 0 for each of {len(given)} checkpoints, found {weights}"
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

    def action() -> int:
        options = parse_arguments(argv)
        if options.command == "info":
            return info(Path(options.what))
        if options.command == "verify":
            return verify(Path(options.what))
        return on_run(options)

    return exit_status(action)


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


def on_run(given: argparse.Namespace) -> int:
    """`build` and `score`. Raises UserError."""
    from dataflex_mega.config.checks import check_dynamic
    from dataflex_mega.config.load import load
    from dataflex_mega.config.parse import parse_config
    from dataflex_mega.distributed.parallel_info import shutdown_distributed
    from dataflex_mega.llamafactory.args import argument_types

    config = parse_config(load(given.what, given.overrides), argument_types())
    if config.dataflex.train_type == "static":
        raise ConfigError("store: the configuration has no selector; it must have one with a store, such as less")
    check_dynamic(config)
    finished = False
    try:
        _work(config, given)
        gc.collect()  # the model's wrappers hold the process group, which must not end inside them
        finished = True
    finally:
        shutdown_distributed(orderly=finished)
    return 0


def _work(config: Any, given: argparse.Namespace) -> None:
    from dataflex_mega.run.build import Opened

    features = features_of(Opened(config), bool(given.checkpoints))
    if given.command == "build":
        build(features, given.folder)
    else:
        score(features, given)


def features_of(run: Any, several: bool = False) -> Any:
    """The features of the run's model; with `several` checkpoints, before one is loaded.

    Raises ConfigError for a selector without a store.
    """
    from dataflex_mega.providers.stored_gradients import Features
    from dataflex_mega.types import UsesStore

    selector = run.roles.selector
    wanted = sorted(name for name in selector.signals if name.startswith("store_")) if selector is not None else []
    if not isinstance(selector, UsesStore) or not wanted:
        name = run.specs["selector"]["name"] if "selector" in run.specs else "none"
        raise ConfigError(f"store: selector {name} uses no store here; less does, with selector.mode: store")
    adam = wanted[0] == "store_adam"
    engine = run.backend.engine(run.tokenizer_module["tokenizer"], len(run.pool.sizes), 1)
    checkpoint = None if several else run.config.llamafactory.get("resume_from_checkpoint")
    if checkpoint:
        load_checkpoint(engine, Path(str(checkpoint)))
    elif adam and not several:
        run.say("note: without resume_from_checkpoint Adam's moments are zero, as before the first step")
    return Features.of(run, engine, selector.feature_spec(), adam)


def load_checkpoint(engine: Any, path: Path) -> None:
    """Parameters and moments of a checkpoint. Raises CheckpointError when it is none."""
    if not (path / "manifest.json").is_file() or not (path / "engine").is_dir():
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a whole checkpoint of dataflex_mega")
    engine.load_state(path / "engine")


def build(features: Any, folder: Path | None) -> None:
    """Build a store, or go on with one."""
    from dataflex_mega.providers.stored_gradients import ensure, place_of

    identity = features.identity()
    run = features.run
    place = folder or place_of(run, run.roles.selector, identity)
    store = ensure(features, place, identity, run.roles.selector.store_block)
    run.say(f"store: {store.layout.num_samples} samples x {store.layout.width} numbers in {place}")


def score(features: Any, given: argparse.Namespace) -> None:
    """Compare all samples with the targets: the share of a rank by itself, then the best of all ranks."""
    import numpy as np

    from dataflex_mega.store import search

    run = features.run
    mine, counts = several(features, given) if given.checkpoints else single(features, given.folder)
    ids, best = search.top_k(mine, run.parallel_info.dp_rank, counts, min(given.top, sum(counts)), run.collectives)
    if given.output is not None:
        everyone = run.collectives.all_gather_uneven(mine, counts)
        if run.parallel_info.is_main:
            np.save(given.output, everyone.numpy())
    if run.parallel_info.is_main:
        for number, value in zip(ids.tolist(), best.tolist(), strict=True):
            print(f"{value:+.4f}  {number}  {run.pool.describe(number)}")


def opened(features: Any, folder: Path | None) -> tuple[Any, Any]:
    """(the store of the model of now, its directions [S, width])."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.providers.stored_gradients import place_of
    from dataflex_mega.signals.computer import target_batches
    from dataflex_mega.store.gradients import GradientStore

    run = features.run
    identity = features.identity()
    place = folder or place_of(run, run.roles.selector, identity)
    store = run_and_agree(run.collectives, partial(GradientStore, place, identity))
    groups, dp_rank, dp_size = list(run.evaluation.values()), run.parallel_info.dp_rank, run.parallel_info.dp_size
    return store, features.directions(target_batches(groups, features.collate, features.batch_size, dp_rank, dp_size))


def single(features: Any, folder: Path | None) -> tuple[Any, list[int]]:
    """([n] scores of this rank's share, samples of each rank)."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.store import search

    run = features.run
    store, directions = opened(features, folder)
    dp_rank, dp_size = run.parallel_info.dp_rank, run.parallel_info.dp_size
    mine = run_and_agree(run.collectives, partial(search.streamed_max_cosine, store, directions, dp_rank, dp_size))
    return mine, search.rank_counts(store, dp_size)


def several(features: Any, given: argparse.Namespace) -> tuple[Any, list[int]]:
    """`single` over checkpoints: the largest, over evaluation sets, of the mean of the cosines by weights."""
    from dataflex_mega.distributed.agreement import run_and_agree
    from dataflex_mega.store import search

    run, engine = features.run, features.engine
    dp_rank, dp_size = run.parallel_info.dp_rank, run.parallel_info.dp_size
    total: Any = 0.0  # [n, S]
    weights, counts = 0.0, None
    for number, checkpoint in enumerate(given.checkpoints):
        load_checkpoint(engine, checkpoint)
        features.maker.refresh()
        weight = given.weights[number] if given.weights else engine.learning_rate()
        if weight <= 0:
            raise ConfigError(
                f"store: the learning rate after {checkpoint} is {weight}; say what counts with --weights"
            )
        run.say(f"{checkpoint}: weight {weight:g}")
        store, directions = opened(features, None)
        if counts is not None and search.rank_counts(store, dp_size) != counts:
            raise CheckpointError(f"store: {store.folder} has blocks of another size than the stores before it")
        counts = search.rank_counts(store, dp_size)
        dot, norm2 = run_and_agree(run.collectives, partial(search.dot_products, store, directions, dp_rank, dp_size))
        total = total + weight * search.cosine_matrix(dot, norm2).double()
        weights += weight
    assert counts is not None, "there is a checkpoint"
    return (total / weights).max(dim=1).values.float(), counts


if __name__ == "__main__":
    sys.exit(run_here(sys.argv[1:]))
