"""`dataflex-cli embed | near | tsds`: what selectors `near` and `tsds` read, made before a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo, init_distributed, shutdown_distributed
from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.offline import encoders, transport
from dataflex_mega.offline.embed import embed
from dataflex_mega.offline.embeddings import open_embeddings
from dataflex_mega.offline.neighbours import RowSubset, NeighbourSearch
from dataflex_mega.offline.sample_sources import FileSource, SampleSource
from dataflex_mega.store.manifest import write_beside

COMMANDS = ("embed", "near", "tsds")
VERSION = 1
AT_ONCE = 4096  # rows whose neighbours are in memory
OpenRun = Callable[[Path, str, Sequence[str]], SampleSource]  # (configuration, part, overrides) -> its samples

EMBED = """Embeddings of samples, one vector each, on disk.

  dataflex-cli embed run.yaml --model BAAI/bge-small-en --output emb/train             the samples of `dataset`
  dataflex-cli embed run.yaml --part eval --model BAAI/bge-small-en --output emb/eval  those of `eval_dataset`
  dataflex-cli embed rows.jsonl --model folder --output emb/rows                       rows of JSON: text, or Alpaca's fields
  dataflex-cli embed run.yaml --encoder model --model saves/run --output emb/train     by the model being trained

For near and tsds give the configuration that will train: its order of samples is what the result's numbers mean.
The text of a sample is what the run's tokenizer makes of its tokens; --encoder model takes the tokens themselves.
Encoders: sentence-transformers (with its own pooling; where a folder has modules.json), encoder (any model of
transformers, mean over tokens), model (a causal model or a LoRA folder, mean over tokens of the last hidden states).

OUTPUT/embeddings.npy is a plain array that numpy.load(..., mmap_mode="r") opens; OUTPUT/manifest.json says what it
belongs to. A build that was killed goes on at the last whole block when the same command is given again. The work is
divided over processes: NPROC_PER_NODE=4 dataflex-cli embed ..., or torchrun."""

NEAR = """Nearest candidates of every query, for selector: near.

  dataflex-cli near --candidates emb/train --queries emb/eval --output top_indices.npy
  dataflex-cli near --candidates emb/train --queries emb/eval --index ivf --nprobe 32

then, in the run's YAML:   selector: {name: near, indices_path: top_indices.npy}

Writes [M, K] int64, the nearest first, as DataFlex does, and OUTPUT.json, from which a run knows that the file belongs to
its data. --index exact compares all; ivf looks into nprobe of nlist lists, and a query that finds fewer than K there is
searched exactly. More candidates need no more memory."""

TSDS = """Chances of candidates by optimal transport from the queries (TSDS, arXiv 2410.11303), for selector: tsds.

  dataflex-cli tsds --candidates emb/train --queries emb/eval --output tsds_probs.npy

then, in the run's YAML:   selector: {name: tsds, probs_path: tsds_probs.npy}

alpha near 1 takes the nearest candidates only, near 0 spreads over --k of them. sigma is the distance within which
candidates count as duplicates of each other and share their chance; 0 turns that off. C is the scale of distances.

--candidates and --queries may be gradient stores (dataflex-cli store build), of one projection: TSDS on the directions of
gradients, whose distances are sqrt(2 - 2 cos). As in LESS: Adam's updates of the candidates, plain gradients of the task.

  dataflex-cli store build run.yaml --folder stores/train
  dataflex-cli store build run.yaml --folder stores/task dataset=task selector.gradient_type=sgd
  dataflex-cli tsds --candidates stores/train --queries stores/task
Writes [N] float64 that sum to 1, as DataFlex does, and OUTPUT.json, from which a run knows that it belongs to its data."""


def parser() -> argparse.ArgumentParser:
    """The options of all three."""
    made = argparse.ArgumentParser(prog="dataflex-cli", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, description=text, formatter_class=formatter)

    add = command("embed", EMBED).add_argument
    add("source", type=Path, metavar="SOURCE", help="a training configuration (.yaml), or rows (.json, .jsonl)")
    add("overrides", nargs="*", metavar="key=value", help="keys of the configuration, changed")
    add("--model", required=True, help="folder or hub name of the encoder")
    add("--output", type=Path, required=True, help="folder of the embeddings")
    add(
        "--part", choices=("train", "eval"), default="train", help="of a configuration: dataset or eval_dataset (train)"
    )
    add("--encoder", choices=encoders.KINDS, default="auto", help="how the model is read (auto)")
    add("--batch-size", type=int, default=32, help="samples a forward pass (32)")
    add("--max-length", type=int, default=512, help="tokens of a sample; the rest is cut (512)")
    add(
        "--compute", choices=("float32", "bfloat16", "float16"), default="float32", help="of the forward pass (float32)"
    )
    add("--dtype", choices=("float32", "float16"), default="float32", help="on disk (float32)")
    add("--block", type=int, default=1024, help="samples between checksums (1024)")
    add("--raw", action="store_true", help="do not divide vectors by their length")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    near, tsds = command("near", NEAR), command("tsds", TSDS)
    for sub, output, k in ((near, "top_indices.npy", 1000), (tsds, "tsds_probs.npy", 5000)):
        add = sub.add_argument
        add(
            "--candidates", type=Path, required=True, help="folder of `embed`, a gradient store, or an [N, D] .npy file"
        )
        add("--queries", type=Path, required=True, help="the same, of the task's samples")
        add("--output", type=Path, default=Path(output), help=f"({output})")
        add("--k", type=int, default=k, help=f"neighbours of a query ({k})")
        add("--index", choices=("exact", "ivf"), default="exact", help="how to search (exact)")
        add("--nlist", type=int, help="ivf: lists (half the square root of N)")
        add("--nprobe", type=int, default=10, help="ivf: lists that are looked into (10)")
    add = tsds.add_argument
    add("--kde-k", type=int, default=1000, help="neighbours that may count as duplicates (1000)")
    add("--sigma", type=float, default=0.75, help="distance within which they do; 0: never (0.75)")
    add("--alpha", type=float, default=0.6, help="nearness against spread, 0 < alpha <= 1 (0.6)")
    add("--c", type=float, default=5.0, help="scale of distances, > 0 (5.0)")
    return made


def main(argv: Sequence[str], open_run: OpenRun) -> int:
    """The exit status: 0; 2 after one line for a user's mistake. `open_run` makes a source of a training configuration."""
    options = parser().parse_args(list(argv))
    finished = False
    try:
        check(options)
        source = source_of(options, open_run) if options.command == "embed" else None
        parallel_info = init_distributed()
        meter = CommandProgress(parallel_info.is_main, options.command)
        try:
            if source is not None:
                do_embed(options, source, parallel_info, meter)
            elif options.command == "near":
                do_near(options, parallel_info, meter)
            else:
                do_tsds(options, parallel_info, meter)
        finally:
            meter.end()
        finished = True
    except UserError as error:  # found by every rank alike, so said once
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
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


def source_of(options: argparse.Namespace, open_run: OpenRun) -> SampleSource:
    """What is to be embedded."""
    if options.source.suffix in (".yaml", ".yml"):
        return open_run(options.source, options.part, options.overrides)
    if options.part != "train":
        raise ConfigError(f"--part: {options.source} has no parts; a training configuration has")
    return FileSource(options.source)


def do_embed(options: argparse.Namespace, source: SampleSource, parallel_info: ParallelInfo, meter: CommandProgress) -> None:
    """`embed`."""
    settings = encoders.EncoderSettings(
        options.model, options.encoder, options.max_length, options.batch_size, not options.raw, options.compute,
        options.trust_remote_code,
    )  # fmt: skip
    encoder = encoders.load(settings, parallel_info.device)
    with torch.random.fork_rng(devices=[]):
        made = embed(source, encoder, options.output, parallel_info, options.dtype, options.block, meter.show)
    meter.say(f"{made.shape[0]} samples x {made.shape[1]} numbers in {made.path}")


def searched(options: argparse.Namespace, parallel_info: ParallelInfo, meter: CommandProgress) -> tuple[Any, ...]:
    """(search, candidates, identity of all that went in, distances, ids)."""
    collectives = TorchCollectives(parallel_info)
    candidates, theirs = open_embeddings(options.candidates)
    queries, ours = open_embeddings(options.queries)
    for name in ("encoder", "model", "model of adam gradients", "model of sgd gradients", "normalize"):
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise ConfigError(f"--queries: {name} {ours[name]}, the candidates' is {theirs[name]}; embed both alike")
    search = NeighbourSearch(
        options.index, options.nlist, options.nprobe, parallel_info.rank, parallel_info.world_size, collectives.all_gather_objects, meter.show
    )
    distances, ids = search(candidates, np.asarray(queries[:]), options.k)
    given = {k: v for k, v in vars(options).items() if k not in ("candidates", "queries", "output", "command")}
    identity = {"candidates": theirs, "queries": ours, "settings": given}
    return search, candidates, identity, distances, ids


def do_near(options: argparse.Namespace, parallel_info: ParallelInfo, meter: CommandProgress) -> None:
    """`near`."""
    _, _, identity, _, ids = searched(options, parallel_info, meter)
    if parallel_info.is_main:
        save(options.output, ids, identity)
    meter.say(f"{ids.shape[1]} neighbours of {ids.shape[0]} queries in {options.output}")


def do_tsds(options: argparse.Namespace, parallel_info: ParallelInfo, meter: CommandProgress) -> None:
    """`tsds`."""
    search, candidates, identity, distances, ids = searched(options, parallel_info, meter)
    rho = np.ones(len(candidates))
    if options.sigma > 0:  # crowding among what was found, as in the authors' code
        found = np.unique(ids[ids >= 0])
        rho[found] = crowding(search, RowSubset(candidates, found), options.kde_k, options.sigma)
    if parallel_info.is_main:
        made = transport.plan(distances, ids, rho, options.alpha, options.c)
        save(options.output, made.chances, identity)
        positive = int((made.chances > 0).sum())
        meter.say(f"{positive} of {len(rho)} candidates have a chance; each query spreads over about {made.spread:.3g}")
        meter.say(f"written: {options.output}")


def crowding(search: NeighbourSearch, rows: RowSubset, k: int, sigma: float) -> np.ndarray:
    """[U] rho of each of U rows among them, some rows at a time: k distances of each are in memory."""
    centres, found = search.centres(rows), []
    for start in range(0, len(rows), AT_ONCE):
        gaps, near = search(rows, rows[start : start + AT_ONCE], k, centres)
        found.append(transport.crowding(gaps, near, sigma))
    return np.concatenate(found)


def save(path: Path, values: np.ndarray, identity: dict[str, Any]) -> None:
    """An array and, beside it, what it belongs to."""
    import io

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    np.save(stream, values)
    write_beside(path, stream.getvalue())
    content = {"version": VERSION, "identity": identity}
    write_beside(path.with_name(path.name + ".json"), json.dumps(content, indent=1, default=str).encode())


class CommandProgress:
    """A progress bar on a terminal, a line now and then elsewhere; on the main process only."""

    def __init__(self, shown: bool, what: str) -> None:
        self.shown, self.what, self.bar, self.task, self.tenth = shown, what, None, None, -1

    def show(self, done: int, total: int) -> None:
        """`done` of `total`."""
        if not self.shown:
            return
        if not sys.stderr.isatty():
            tenth = 10 * done // max(1, total)
            if tenth > self.tenth:
                print(f"{self.what}: {done}/{total}", file=sys.stderr, flush=True)
            self.tenth = tenth if done < total else -1
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar: Any = Progress(*columns, console=Console(stderr=True))
            self.task: Any = self.bar.add_task(self.what, total=total)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=total)

    def say(self, text: str) -> None:
        """A line."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()
