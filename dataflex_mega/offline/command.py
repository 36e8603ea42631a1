"""`dataflex-cli embed | near | tsds`: the files that selectors `near` and `tsds` read, computed before a run."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo, init_distributed, shutdown_distributed
from dataflex_mega.errors import ConfigError
from dataflex_mega.exit_status import OneLineParser, exit_status
from dataflex_mega.files import atomic_write
from dataflex_mega.log import get_logger
from dataflex_mega.offline import encoders, transport
from dataflex_mega.offline.embed import embed
from dataflex_mega.offline.embeddings import open_embeddings
from dataflex_mega.offline.neighbours import NeighbourSearch, RowSubset
from dataflex_mega.offline.sample_sources import FileSource, SampleSource

COMMANDS = ("embed", "near", "tsds")
VERSION = 1
DENSITY_ROWS = 4096  # whose neighbours are in memory at a time
OpenRun = Callable[[Path, str, Sequence[str]], SampleSource]  # (configuration, train or eval, overrides) -> its samples

EMBED_HELP = """Embeddings of samples, one vector each, on disk.

  dataflex-cli embed run.yaml --model BAAI/bge-small-en --output emb/train             the samples of `dataset`
  dataflex-cli embed run.yaml --part eval --model BAAI/bge-small-en --output emb/eval  those of `eval_dataset`
  dataflex-cli embed rows.jsonl --model folder --output emb/rows                       rows of JSON: text, or Alpaca's fields
  dataflex-cli embed run.yaml --encoder model --model saves/run --output emb/train     by the model being trained

For near and tsds give the configuration that will train: results are sample numbers in its order.
The text of a sample is decoded from its tokens by the run's tokenizer; --encoder model takes the tokens themselves.
Encoders: sentence-transformers (with its own pooling; where a folder has modules.json), encoder (any model of
transformers, mean over tokens), model (a causal model or a LoRA folder, mean over tokens of the last hidden states).

OUTPUT/embeddings.npy is a plain array that numpy.load(..., mmap_mode="r") opens; OUTPUT/manifest.json has its identity.
A build that was killed continues at the last complete block when the same command is given again. The work is
divided over processes: NPROC_PER_NODE=4 dataflex-cli embed ..., or torchrun."""

NEAR_HELP = """Nearest candidates of every query, for selector: near.

  dataflex-cli near --candidates emb/train --queries emb/eval --output top_indices.npy
  dataflex-cli near --candidates emb/train --queries emb/eval --index ivf --nprobe 32

then, in the run's YAML:   selector: {name: near, indices_path: top_indices.npy}

Writes [M, K] int64, the nearest first, as DataFlex does, and OUTPUT.json, from which a run knows that the file belongs to
its data. --index exact compares all; ivf searches nprobe of nlist lists, and a query that finds fewer than K there is
searched exactly. More candidates need no more memory."""

TSDS_HELP = """Probabilities of candidates by optimal transport from the queries (TSDS, arXiv 2410.11303), selector: tsds.

  dataflex-cli tsds --candidates emb/train --queries emb/eval --output tsds_probs.npy

then, in the run's YAML:   selector: {name: tsds, probs_path: tsds_probs.npy}

alpha near 1 takes the nearest candidates only, near 0 spreads over --k of them. sigma is the distance within which
candidates count as duplicates of each other and share their probability; 0 turns that off. C is the scale of distances.

--candidates and --queries may be gradient stores (dataflex-cli store build), of one projection: TSDS on the directions of
gradients, whose distances are sqrt(2 - 2 cos). As in LESS: Adam's updates of the candidates, plain gradients of the task.

  dataflex-cli store build run.yaml --folder stores/train
  dataflex-cli store build run.yaml --folder stores/task dataset=task selector.gradient_type=sgd
  dataflex-cli tsds --candidates stores/train --queries stores/task
Writes [N] float64 that sum to 1, as DataFlex does, and OUTPUT.json, from which a run knows that it belongs to its data."""


def parser() -> argparse.ArgumentParser:
    """The options of all three commands."""
    result = OneLineParser(prog="dataflex-cli", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> OneLineParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, description=text, formatter_class=formatter)

    add = command("embed", EMBED_HELP).add_argument
    add("source", type=Path, metavar="SOURCE", help="a training configuration (.yaml), or rows (.json, .jsonl)")
    add("overrides", nargs="*", metavar="key=value", help="keys of the configuration, changed")
    add("--model", required=True, help="folder or hub name of the encoder")
    add("--output", type=Path, required=True, help="folder of the embeddings")
    add(
        "--part", choices=("train", "eval"), default="train", help="of a configuration: dataset or eval_dataset (train)"
    )
    add("--encoder", choices=encoders.KINDS, default="auto", help="how the model is read (auto)")
    add("--batch-size", type=int, default=32, help="samples per forward pass (32)")
    add("--max-length", type=int, default=512, help="tokens of a sample; the rest is dropped (512)")
    add(
        "--compute", choices=("float32", "bfloat16", "float16"), default="float32", help="of the forward pass (float32)"
    )
    add("--dtype", choices=("float32", "float16"), default="float32", help="on disk (float32)")
    add("--block", type=int, default=1024, help="samples per checksum (1024)")
    add("--raw", action="store_true", help="do not divide vectors by their length")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    near, tsds = command("near", NEAR_HELP), command("tsds", TSDS_HELP)
    for sub, output, k in ((near, "top_indices.npy", 1000), (tsds, "tsds_probs.npy", 5000)):
        add = sub.add_argument
        add(
            "--candidates", type=Path, required=True, help="folder of `embed`, a gradient store, or an [N, D] .npy file"
        )
        add("--queries", type=Path, required=True, help="the same, of the task's samples")
        add("--output", type=Path, default=Path(output), help=f"({output})")
        add("--k", type=int, default=k, help=f"neighbours per query ({k})")
        add("--index", choices=("exact", "ivf"), default="exact", help="how to search (exact)")
        add("--nlist", type=int, help="ivf: lists (half the square root of N)")
        add("--nprobe", type=int, default=10, help="ivf: lists that are searched (10)")
    add = tsds.add_argument
    add("--kde-k", type=int, default=1000, help="neighbours that may count as duplicates (1000)")
    add("--sigma", type=float, default=0.75, help="distance within which they count as duplicates; 0: never (0.75)")
    add("--alpha", type=float, default=0.6, help="trade-off of nearness and spread, 0 < alpha <= 1 (0.6)")
    add("--c", type=float, default=5.0, help="scale of distances, > 0 (5.0)")
    return result


def main(argv: Sequence[str], open_run: OpenRun) -> int:
    """The exit status: 0; see `exit_status` for mistakes. `open_run` opens a training configuration as a source."""
    return exit_status(lambda: run(argv, open_run))


def run(argv: Sequence[str], open_run: OpenRun) -> int:
    """One of the three commands -> 0. Raises UserError."""
    options = parser().parse_args(list(argv))
    finished = False
    try:
        check(options)
        source = open_source(options, open_run) if options.command == "embed" else None
        parallel_info = init_distributed()
        progress = CommandProgress(parallel_info.is_main, options.command)
        try:
            if source is not None:
                run_embed(options, source, parallel_info, progress)
            elif options.command == "near":
                run_near(options, parallel_info, progress)
            else:
                run_tsds(options, parallel_info, progress)
        finally:
            progress.close()
        finished = True
    finally:
        shutdown_distributed(orderly=finished)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError naming an option that is out of range."""
    for name in ("batch_size", "max_length", "block", "k", "nlist", "nprobe", "kde_k"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be >= 1, found {value}")
    if options.command == "tsds":
        if not 0 < options.alpha <= 1:
            raise ConfigError(f"--alpha: must be > 0 and <= 1, found {options.alpha}")
        if not options.c > 0:
            raise ConfigError(f"--c: must be > 0, found {options.c}")
        if not options.sigma >= 0:
            raise ConfigError(f"--sigma: must be >= 0, found {options.sigma}")
    if options.command == "embed" and options.overrides and options.source.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{options.overrides[0]}: keys can be changed of a configuration, not of {options.source}")


def open_source(options: argparse.Namespace, open_run: OpenRun) -> SampleSource:
    """The samples to embed. Raises UserError."""
    if options.source.suffix in (".yaml", ".yml"):
        return open_run(options.source, options.part, options.overrides)
    if options.part != "train":
        raise ConfigError(f"--part: {options.source} has no parts; a training configuration has")
    return FileSource(options.source)


def run_embed(
    options: argparse.Namespace, source: SampleSource, parallel_info: ParallelInfo, progress: CommandProgress
) -> None:
    """Write the embeddings of a source."""
    settings = encoders.EncoderSettings(
        options.model, options.encoder, options.max_length, options.batch_size, not options.raw, options.compute,
        options.trust_remote_code,
    )  # fmt: skip
    encoder = encoders.load(settings, parallel_info.device)
    with torch.random.fork_rng(devices=[]):
        result = embed(source, encoder, options.output, parallel_info, options.dtype, options.block, progress.update)
    progress.print_line(f"{result.shape[0]} samples x {result.shape[1]} numbers in {result.path}")


def find_neighbours(
    options: argparse.Namespace, parallel_info: ParallelInfo, progress: CommandProgress
) -> tuple[Any, ...]:
    """(search, candidates, identity of inputs and settings, [M, K] distances, [M, K] ids)."""
    collectives = TorchCollectives(parallel_info)
    candidates, candidate_identity = open_embeddings(options.candidates)
    queries, query_identity = open_embeddings(options.queries)
    for name in ("encoder", "model", "model of adam gradients", "model of sgd gradients", "normalize"):
        ours, theirs = query_identity.get(name), candidate_identity.get(name)
        if name in query_identity and name in candidate_identity and ours != theirs:
            raise ConfigError(f"--queries: {name} {ours}, the candidates' is {theirs}; embed both alike")
    search = NeighbourSearch(
        options.index,
        options.nlist,
        options.nprobe,
        parallel_info.rank,
        parallel_info.world_size,
        collectives.all_gather_objects,
        progress.update,
    )
    distances, ids = search(candidates, np.asarray(queries[:]), options.k)
    settings = {k: v for k, v in vars(options).items() if k not in ("candidates", "queries", "output", "command")}
    identity = {"candidates": candidate_identity, "queries": query_identity, "settings": settings}
    return search, candidates, identity, distances, ids


def run_near(options: argparse.Namespace, parallel_info: ParallelInfo, progress: CommandProgress) -> None:
    """Write the nearest candidates of every query."""
    _, _, identity, _, ids = find_neighbours(options, parallel_info, progress)
    if parallel_info.is_main:
        save(options.output, ids, identity)
    progress.print_line(f"{ids.shape[1]} neighbours of {ids.shape[0]} queries in {options.output}")


def run_tsds(options: argparse.Namespace, parallel_info: ParallelInfo, progress: CommandProgress) -> None:
    """Write the probability of every candidate."""
    search, candidates, identity, distances, ids = find_neighbours(options, parallel_info, progress)
    rho = np.ones(len(candidates))
    if options.sigma > 0:  # density among the neighbours that were found, as in the authors' code
        neighbours = np.unique(ids[ids >= 0])
        rho[neighbours] = estimate_density(search, RowSubset(candidates, neighbours), options.kde_k, options.sigma)
    if parallel_info.is_main:
        plan = transport.tsds_plan(distances, ids, rho, options.alpha, options.c)
        save(options.output, plan.probabilities, identity)
        positive = int((plan.probabilities > 0).sum())
        progress.print_line(
            f"{positive} of {len(rho)} candidates can be drawn; each query spreads over about {plan.spread:.3g}"
        )
        progress.print_line(f"written: {options.output}")


def estimate_density(search: NeighbourSearch, rows: RowSubset, k: int, sigma: float) -> np.ndarray:
    """[U] kernel density of each of U rows among them, in chunks: k distances of each row are in memory."""
    centres, chunks = search.train_centres(rows), []
    for start in range(0, len(rows), DENSITY_ROWS):
        distances, ids = search(rows, rows[start : start + DENSITY_ROWS], k, centres)
        chunks.append(transport.kernel_density(distances, ids, sigma))
    return np.concatenate(chunks)


def save(path: Path, values: np.ndarray, identity: dict[str, Any]) -> None:
    """Write an array and, as PATH.json, its identity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.save(stream, values)
    atomic_write(path, stream.getvalue())
    content = {"version": VERSION, "identity": identity}
    atomic_write(path.with_name(path.name + ".json"), json.dumps(content, indent=1, default=str))


class CommandProgress:
    """A progress bar on a terminal, a line per tenth elsewhere; on the main process only."""

    def __init__(self, is_shown: bool, label: str) -> None:
        self.is_shown, self.label, self.bar, self.task, self.tenth = is_shown, label, None, None, -1

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` rows are finished."""
        if not self.is_shown:
            return
        if not sys.stderr.isatty():
            tenth = 10 * done // max(1, total)
            if tenth > self.tenth:
                get_logger().info("%s: %d/%d", self.label, done, total)
            self.tenth = tenth if done < total else -1
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar: Any = Progress(*columns, console=Console(stderr=True))
            self.task: Any = self.bar.add_task(self.label, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total)

    def print_line(self, text: str) -> None:
        """Print a line on standard error."""
        if self.is_shown:
            get_logger().info("%s", text)

    def close(self) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self.bar is not None:
            self.bar.stop()
