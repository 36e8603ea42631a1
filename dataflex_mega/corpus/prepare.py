"""From input files to a corpus: divide them into units, encode the units, merge them, write the manifest.

Unfinished work lies in OUTPUT/.unfinished: `job.json` (inputs and options) and the encoded units. The result depends on the
inputs alone: not on the number of workers, not on where a unit ends, not on interruptions.
"""

from __future__ import annotations

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
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from dataflex_mega.corpus.document_tokenizer import document_tokenizer
from dataflex_mega.corpus.encoded_units import EncodedUnit, WorkUnit, encode_unit, read_encoded_unit
from dataflex_mega.corpus.input_files import FileSlice, InputFile, open_parquet
from dataflex_mega.corpus.merge import MergedFiles, merge_domain, row_location, write_bad_rows
from dataflex_mega.corpus.progress import ProgressDisplay
from dataflex_mega.data import manifest
from dataflex_mega.data.manifest import Corpus, CorpusDomain
from dataflex_mega.errors import DataError
from dataflex_mega.files import atomic_write
from dataflex_mega.locks import locked

WORK_FOLDER, BAD_ROWS = ".unfinished", "bad_rows.jsonl"
PRELOAD = ("dataflex_mega.corpus.encoded_units", "transformers.models.auto.tokenization_auto")
MIN_ROWS_TO_JUDGE = 1000  # before the fraction of bad rows may stop the work early


@dataclass(frozen=True)
class PrepareJob:
    """Inputs and options of one corpus.

    Args:
        input_files: in order.
        tokenizer: Hugging Face tokenizer folder.
        output: folder of the corpus.
        workers: processes.
        max_bad: largest fraction of bad rows, 0 to 1.
        unit_bytes: input bytes of a unit of work.
        max_document_bytes: a longer line is a bad row.
        overwrite: replace the content of the folder.
    """

    input_files: tuple[InputFile, ...]
    tokenizer: str
    output: Path
    workers: int = 1
    max_bad: float = 0.01
    unit_bytes: int = 1 << 25
    max_document_bytes: int = 1 << 26
    overwrite: bool = False


@dataclass(frozen=True)
class PrepareResult:
    """A finished corpus and the problems of its bad rows."""

    corpus: Corpus
    problems: dict[str, tuple[int, dict[str, Any]]]  # of bad rows: problem -> (count, location of the first)
    is_new: bool  # False when the folder held this corpus already


def prepare(job: PrepareJob, progress: ProgressDisplay) -> PrepareResult:
    """Write the corpus, or continue where a killed run stopped.

    Raises:
        DataError: a broken or changed input, more bad rows than `max_bad`, no usable row, an output folder that holds
            something else or is being written by another process.
        ConfigError: a tokenizer that cannot be loaded.
    """
    tokenizer = document_tokenizer(job.tokenizer)
    recipe = _recipe(job, tokenizer.identity().fingerprint)
    job.output.mkdir(parents=True, exist_ok=True)
    with locked(job.output, f"--output: another process is writing {job.output}: {{holder}}"):
        existing = _existing_corpus(job, recipe)
        if existing is not None:
            return PrepareResult(existing, {}, is_new=False)
        units = plan_units(job.input_files, job.unit_bytes)
        work = _open_work_folder(job, recipe)
        encoded = _encode_units(job, units, work, progress)
        problems = write_bad_rows(units, work, job.output / BAD_ROWS)
        num_rows, num_bad = sum(unit.num_rows for unit in encoded), sum(unit.num_bad_rows for unit in encoded)
        _check_bad_rows(job, num_rows, num_bad, next(iter(problems.values()))[1] if problems else None)
        domains = sorted({block.domain for unit in encoded for block in unit.blocks})
        if not domains:
            raise DataError(f"no usable row in {len(job.input_files)} files; see {job.output / BAD_ROWS}")
        progress.on_merge(len(domains))
        entries = _corpus_domains(domains, _merge_domains(job, units, work, domains, tokenizer.dtype))
        inputs = tuple({"path": file.path, "bytes": file.size} for file in job.input_files)
        identity = tokenizer.identity()
        corpus = Corpus(job.output, tokenizer.dtype, identity, entries, num_rows, num_bad, inputs, recipe)
        atomic_write(job.output / manifest.NAME, corpus.to_json())
        shutil.rmtree(work)
    return PrepareResult(corpus, problems, is_new=True)


# -- the job -----------------------------------------------------------------------------------------------------------


def _recipe(job: PrepareJob, tokenizer: str) -> str:
    """A hash of everything that decides the result, except the contents of the inputs."""
    body = [manifest.VERSION, [asdict(file) for file in job.input_files], tokenizer, job.max_document_bytes]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _existing_corpus(job: PrepareJob, recipe: str) -> Corpus | None:
    """The finished corpus in the output folder. Raises DataError when it is another one and must not be overwritten."""
    if not (job.output / manifest.NAME).is_file():
        return None
    if job.overwrite:
        (job.output / manifest.NAME).unlink()
        return None
    corpus = manifest.read(job.output, "--output")
    if corpus.recipe != recipe:
        raise DataError(f"--output: {job.output} holds a corpus of other inputs or options; --overwrite replaces it")
    return corpus


def _open_work_folder(job: PrepareJob, recipe: str) -> Path:
    """The folder of the encoded units. Raises DataError when it holds those of another job."""
    work = job.output / WORK_FOLDER
    if job.overwrite and work.exists():
        shutil.rmtree(work)
    times = [Path(file.path).stat().st_mtime_ns for file in job.input_files]
    expected = json.dumps({"recipe": recipe, "unit_bytes": job.unit_bytes, "changed": times})
    file = work / "job.json"
    if file.is_file() and file.read_text(encoding="utf-8") != expected:
        raise DataError(
            f"--output: {job.output} holds unfinished work on other inputs or options, or an input has changed since; "
            "--overwrite starts anew"
        )
    work.mkdir(exist_ok=True)
    if not file.is_file():
        atomic_write(file, expected)
    return work


# -- units -------------------------------------------------------------------------------------------------------------


def plan_units(input_files: Sequence[InputFile], unit_bytes: int) -> list[WorkUnit]:
    """Files -> units of about `unit_bytes`, in order: large files are divided where possible, small ones share a unit."""
    units: list[WorkUnit] = []
    pending: list[FileSlice] = []
    for number, file in enumerate(input_files):
        for file_slice in _slices(number, file, unit_bytes):
            if pending and sum(s.size for s in pending) + file_slice.size > unit_bytes:
                units.append(WorkUnit(len(units), tuple(pending)))
                pending = []
            pending.append(file_slice)
    return [*units, WorkUnit(len(units), tuple(pending))] if pending else units


def _slices(number: int, file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    if file.kind == "jsonl":
        for start in range(0, file.size, unit_bytes):
            stop = min(start + unit_bytes, file.size)
            yield FileSlice(file, number, start, stop, stop - start)
    elif file.kind == "parquet":
        yield from _row_group_slices(number, file, unit_bytes)
    else:
        yield FileSlice(file, number, 0, file.size, file.size)


def _row_group_slices(number: int, file: InputFile, unit_bytes: int) -> Iterator[FileSlice]:
    metadata = open_parquet(file.path).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group + 1 == metadata.num_row_groups:
            yield FileSlice(file, number, start, group + 1, size)
            start, size = group + 1, 0


# -- work --------------------------------------------------------------------------------------------------------------


def _encode_units(job: PrepareJob, units: list[WorkUnit], work: Path, progress: ProgressDisplay) -> list[EncodedUnit]:
    """Encode the units that no former run has finished -> all of them in order."""
    encoded: dict[int, EncodedUnit] = {}
    for unit in units:
        finished = read_encoded_unit(unit.stem(work))
        if finished is not None:
            encoded[unit.number] = finished
    progress.on_begin(sum(unit.size for unit in units), sum(units[n].size for n in encoded))
    num_rows = sum(unit.num_rows for unit in encoded.values())
    num_bad = sum(unit.num_bad_rows for unit in encoded.values())
    tasks = [(unit, work, job.tokenizer, job.max_document_bytes) for unit in units if unit.number not in encoded]
    for number, result in _run_tasks(job.workers, encode_unit, tasks):
        encoded[number] = result
        num_rows, num_bad = num_rows + result.num_rows, num_bad + result.num_bad_rows
        if num_rows >= MIN_ROWS_TO_JUDGE and result.first_bad_row is not None:
            _check_bad_rows(job, num_rows, num_bad, _location_in_file(units[number], result.first_bad_row))
        progress.on_unit(units[number].size, result)
    return [encoded[unit.number] for unit in units]


def _location_in_file(unit: WorkUnit, bad_row: tuple[int, int, str]) -> dict[str, Any]:
    """The location of a bad row while former units may be unfinished: the lines before it are counted in the file."""
    slice_index, row, _ = bad_row
    return row_location(unit, slice_index, row, _rows_before(unit.slices[slice_index]))


def _rows_before(file_slice: FileSlice) -> int:
    file = file_slice.input_file
    if file.kind == "parquet":
        metadata = open_parquet(file.path).metadata
        return sum(metadata.row_group(group).num_rows for group in range(file_slice.start))
    lines, remaining = 0, file_slice.start if file.kind == "jsonl" else 0
    with Path(file.path).open("rb") as stream:
        while remaining and (data := stream.read(min(remaining, 1 << 20))):
            lines, remaining, last = lines + data.count(b"\n"), remaining - len(data), data[-1:]
    return lines + int(file_slice.start > 0 and file.kind == "jsonl" and last != b"\n")


def _check_bad_rows(job: PrepareJob, num_rows: int, num_bad: int, first: dict[str, Any] | None) -> None:
    if num_rows and num_bad / num_rows > job.max_bad:
        where = ", ".join(f"{key} {value}" if key != "file" else str(value) for key, value in (first or {}).items())
        raise DataError(
            f"{num_bad} of {num_rows} rows are bad, more than --max-bad {job.max_bad} allows; one is {where}"
        )


def _merge_domains(
    job: PrepareJob, units: list[WorkUnit], work: Path, domains: list[str], dtype: str
) -> dict[str, tuple[str, MergedFiles]]:
    """Domain -> (file name without suffix, its finished pair)."""
    prefixes = file_names(domains)
    tasks = [(units, work, domain, job.output / prefixes[domain], dtype) for domain in domains]
    merged = dict(_run_tasks(job.workers, _merge_one, tasks))
    return {domain: (prefixes[domain], merged[domain]) for domain in domains}


def _merge_one(units: list[WorkUnit], work: Path, domain: str, prefix: Path, dtype: str) -> tuple[str, MergedFiles]:
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


def _corpus_domains(domains: Sequence[str], merged: dict[str, tuple[str, MergedFiles]]) -> tuple[CorpusDomain, ...]:
    total = sum(pair.tokens for _, pair in merged.values())
    return tuple(
        CorpusDomain(name, prefix, pair.documents, pair.tokens, pair.tokens / total, pair.bin_sha256, pair.idx_sha256)
        for name, (prefix, pair) in ((domain, merged[domain]) for domain in domains)
    )


# -- processes ---------------------------------------------------------------------------------------------------------


def _run_tasks(workers: int, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """work(*task) of every task, in the order in which they end; in this process for one worker."""
    if workers == 1 or len(tasks) <= 1:
        for task in tasks:
            yield work(*task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))  # imported once instead of by every worker
    pool = ProcessPoolExecutor(workers, context, initializer=_exit_with_parent)
    try:
        yield from _results_as_completed(pool, workers, work, tasks)
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps because memory ran out; run again to continue") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _results_as_completed(
    pool: Executor, workers: int, work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[Any]:
    """Only a few tasks are submitted ahead, so that an error in one ends the work soon."""
    running: set[Future[Any]] = set()
    remaining = iter(tasks)
    while True:
        while len(running) < 2 * workers and (task := next(remaining, None)) is not None:
            running.add(pool.submit(work, *task))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _exit_with_parent() -> None:
    """End a worker with the process that started it, even when that was killed: otherwise it would continue to write into a
    folder where a new run has begun."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
