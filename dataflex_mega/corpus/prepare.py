"""The whole way from input files to a corpus: cut into units, process them, merge, write the manifest.

Everything unfinished lies in OUTPUT/.unfinished: `job.json` (what is being made), a part for each finished unit. The
result depends on the inputs alone: not on the number of workers, not on where a unit ends, not on interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Protocol

from dataflex_mega.corpus.encode import encoder
from dataflex_mega.corpus.merge import Merged, merge_domain, place, write_bad_rows
from dataflex_mega.corpus.parts import Part, Unit, make_part, read_part, write_whole
from dataflex_mega.corpus.sources import Piece, Source, open_parquet
from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import Corpus, CorpusDomain
from dataflex_mega.errors import DataError

WORK, BAD_ROWS = ".unfinished", "bad_rows.jsonl"
PRELOAD = ("dataflex_mega.corpus.parts", "transformers.models.auto.tokenization_auto")
ENOUGH_ROWS = 1000  # before a share of bad rows stops the work early


class Progress(Protocol):
    """Who is told how far it is."""

    def begin(self, total: int, done: int) -> None:
        """`done` of `total` bytes were read by a run before."""
        ...

    def unit(self, size: int, part: Part) -> None:
        """A unit of `size` bytes is finished."""
        ...

    def merging(self, domains: int) -> None:
        """All units are finished."""
        ...


@dataclass(frozen=True)
class Job:
    """What to make.

    Args:
        sources: input files, in order.
        tokenizer: Hugging Face tokenizer folder.
        output: folder of the corpus.
        workers: processes.
        max_bad: largest share of bad rows, 0 to 1.
        unit_bytes: input bytes of a unit of work.
        longest: bytes of the longest line that is read.
        overwrite: replace what the folder holds.
    """

    sources: tuple[Source, ...]
    tokenizer: str
    output: Path
    workers: int = 1
    max_bad: float = 0.01
    unit_bytes: int = 1 << 25
    longest: int = 1 << 26
    overwrite: bool = False


@dataclass(frozen=True)
class Result:
    """A finished corpus, and the bad rows by problem: how many, the first place. `made` is False when it was there."""

    corpus: Corpus
    problems: dict[str, tuple[int, dict[str, Any]]]
    made: bool


def prepare(job: Job, progress: Progress) -> Result:
    """Make the corpus, or go on where a killed run stopped.

    Raises:
        DataError: a broken or changed input, more bad rows than `max_bad`, no usable row, an output folder that holds
            something else or is being written by another process.
        ConfigError: a tokenizer that cannot be loaded.
    """
    code = encoder(job.tokenizer)
    recipe = _recipe(job, code.identity().fingerprint)
    job.output.mkdir(parents=True, exist_ok=True)
    with _locked(job.output):
        present = _present(job, recipe)
        if present is not None:
            return Result(present, {}, made=False)
        units = plan(job.sources, job.unit_bytes)
        work = _open_work(job, recipe)
        parts = _make_parts(job, units, work, progress)
        problems = write_bad_rows(units, work, job.output / BAD_ROWS)
        rows, bad = sum(sum(part.rows) for part in parts), sum(part.bad for part in parts)
        _check_bad(job, rows, bad, next(iter(problems.values()))[1] if problems else None)
        domains = sorted({block.domain for part in parts for block in part.blocks})
        if not domains:
            raise DataError(f"no usable row in {len(job.sources)} files; see {job.output / BAD_ROWS}")
        progress.merging(len(domains))
        merged = _merge(job, units, work, domains, code.dtype)
        inputs = tuple({"path": source.path, "bytes": source.size} for source in job.sources)
        entries = _entries(domains, merged)
        corpus = Corpus(job.output, code.dtype, code.identity(), entries, rows, bad, inputs, recipe)
        write_whole(job.output / manifest.NAME, corpus.to_json())
        shutil.rmtree(work)
    return Result(corpus, problems, made=True)


# -- the job -----------------------------------------------------------------------------------------------------------


def _recipe(job: Job, tokenizer: str) -> str:
    """A hash of all that decides the result, the contents of the inputs left out."""
    body = [manifest.VERSION, [asdict(source) for source in job.sources], tokenizer, job.longest]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _present(job: Job, recipe: str) -> Corpus | None:
    """The corpus that is already there. Raises DataError when it is another one and must not be overwritten."""
    if not (job.output / manifest.NAME).is_file():
        return None
    if job.overwrite:
        (job.output / manifest.NAME).unlink()
        return None
    corpus = manifest.read(job.output, "--output")
    if corpus.recipe != recipe:
        raise DataError(f"--output: {job.output} holds a corpus of other inputs or options; --overwrite replaces it")
    return corpus


def _open_work(job: Job, recipe: str) -> Path:
    """The folder of the parts. Raises DataError when it holds those of another job."""
    work = job.output / WORK
    if job.overwrite and work.exists():
        shutil.rmtree(work)
    times = [Path(source.path).stat().st_mtime_ns for source in job.sources]
    wanted = json.dumps({"recipe": recipe, "unit_bytes": job.unit_bytes, "changed": times})
    file = work / "job.json"
    if file.is_file() and file.read_text(encoding="utf-8") != wanted:
        raise DataError(
            f"--output: {job.output} holds unfinished work on other inputs or options, or an input has changed since; "
            "--overwrite starts anew"
        )
    work.mkdir(exist_ok=True)
    if not file.is_file():
        write_whole(file, wanted)
    return work


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder; the system lets go of it when this process ends in whatever way. Raises DataError when held."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"--output: another process is writing {folder}") from error
    finally:
        os.close(handle)


# -- units -------------------------------------------------------------------------------------------------------------


def plan(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """Sources -> units of about `unit_bytes`, in order: large files are cut where they can be, small ones share a unit."""
    units: list[Unit] = []
    held: list[Piece] = []
    for number, source in enumerate(sources):
        for piece in _pieces(number, source, unit_bytes):
            if held and sum(p.size for p in held) + piece.size > unit_bytes:
                units.append(Unit(len(units), tuple(held)))
                held = []
            held.append(piece)
    return [*units, Unit(len(units), tuple(held))] if held else units


def _pieces(number: int, source: Source, unit_bytes: int) -> Iterator[Piece]:
    if source.kind == "jsonl":
        for start in range(0, source.size, unit_bytes):
            stop = min(start + unit_bytes, source.size)
            yield Piece(source, number, start, stop, stop - start)
    elif source.kind == "parquet":
        yield from _row_groups(number, source, unit_bytes)
    else:
        yield Piece(source, number, 0, source.size, source.size)


def _row_groups(number: int, source: Source, unit_bytes: int) -> Iterator[Piece]:
    about = open_parquet(source.path).metadata
    start, size = 0, 0
    for group in range(about.num_row_groups):
        size += about.row_group(group).total_byte_size
        if size >= unit_bytes or group + 1 == about.num_row_groups:
            yield Piece(source, number, start, group + 1, size)
            start, size = group + 1, 0


# -- work --------------------------------------------------------------------------------------------------------------


def _make_parts(job: Job, units: list[Unit], work: Path, progress: Progress) -> list[Part]:
    """All parts in order, the missing ones made."""
    parts: dict[int, Part] = {}
    for unit in units:
        part = read_part(unit.stem(work))
        if part is not None:
            parts[unit.number] = part
    progress.begin(sum(unit.size for unit in units), sum(units[n].size for n in parts))
    rows, bad = sum(sum(part.rows) for part in parts.values()), sum(part.bad for part in parts.values())
    missing = [(unit, work, job.tokenizer, job.longest) for unit in units if unit.number not in parts]
    for number, part in _each(job.workers, make_part, missing):
        parts[number] = part
        rows, bad = rows + sum(part.rows), bad + part.bad
        if rows >= ENOUGH_ROWS and part.first_bad is not None:
            _check_bad(job, rows, bad, _place_of(units[number], part.first_bad))
        progress.unit(units[number].size, part)
    return [parts[unit.number] for unit in units]


def _place_of(unit: Unit, bad: tuple[int, int, str]) -> dict[str, Any]:
    """Where a bad row of one unit is, when the units before it may not be finished: lines are counted in the file."""
    piece, row, _ = bad
    return place(unit, piece, row, _rows_before(unit.pieces[piece]))


def _rows_before(piece: Piece) -> int:
    if piece.source.kind == "parquet":
        about = open_parquet(piece.source.path).metadata
        return sum(about.row_group(group).num_rows for group in range(piece.start))
    lines, left = 0, piece.start if piece.source.kind == "jsonl" else 0
    with Path(piece.source.path).open("rb") as stream:
        while left and (data := stream.read(min(left, 1 << 20))):
            lines, left, last = lines + data.count(b"\n"), left - len(data), data[-1:]
    return lines + int(piece.start > 0 and piece.source.kind == "jsonl" and last != b"\n")


def _check_bad(job: Job, rows: int, bad: int, first: dict[str, Any] | None) -> None:
    if rows and bad / rows > job.max_bad:
        where = ", ".join(f"{key} {value}" if key != "file" else str(value) for key, value in (first or {}).items())
        raise DataError(f"{bad} of {rows} rows are bad, more than --max-bad {job.max_bad} allows; one is {where}")


def _merge(job: Job, units: list[Unit], work: Path, domains: list[str], dtype: str) -> dict[str, tuple[str, Merged]]:
    """Domain -> (file name without suffix, its finished pair)."""
    prefixes = file_names(domains)
    tasks = [(units, work, domain, job.output / prefixes[domain], dtype) for domain in domains]
    found = dict(_each(job.workers, _merge_one, tasks))
    return {domain: (prefixes[domain], found[domain]) for domain in domains}


def _merge_one(units: list[Unit], work: Path, domain: str, prefix: Path, dtype: str) -> tuple[str, Merged]:
    return domain, merge_domain(units, work, domain, prefix, dtype)


def file_names(domains: Sequence[str]) -> dict[str, str]:
    """Domain names -> distinct file names that every system takes."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for domain in domains:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", domain).strip(".")[:100] or "domain"
        name, number = plain, 2
        while name.lower() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.lower())
        names[domain] = name
    return names


def _entries(domains: Sequence[str], merged: dict[str, tuple[str, Merged]]) -> tuple[CorpusDomain, ...]:
    total = sum(pair.tokens for _, pair in merged.values())
    return tuple(
        CorpusDomain(name, prefix, pair.documents, pair.tokens, pair.tokens / total, pair.bin_sha256, pair.idx_sha256)
        for name, (prefix, pair) in ((domain, merged[domain]) for domain in domains)
    )


# -- processes ---------------------------------------------------------------------------------------------------------


def _each(workers: int, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """work(*task) of every task, in whatever order they end; in this process for one worker."""
    if workers == 1 or len(tasks) <= 1:
        for task in tasks:
            yield work(*task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))  # imported once, and not by every worker
    pool = ProcessPoolExecutor(workers, context, initializer=_follow_parent)
    try:
        yield from _unordered(pool, workers, work, tasks)
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps for want of memory; run again to continue") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _unordered(
    pool: Executor, workers: int, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[Any]:
    """Few tasks are handed out ahead, so that a mistake in one ends the work soon."""
    waiting: set[Future[Any]] = set()
    left = iter(tasks)
    while True:
        while len(waiting) < 2 * workers and (task := next(left, None)) is not None:
            waiting.add(pool.submit(work, *task))
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _follow_parent() -> None:
    """A worker ends with the process that started it, even when that was killed: else it would write parts of its own
    into a folder where a new run has begun."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
