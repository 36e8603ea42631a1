"""LLaMA-Factory datasets as domains of a pool, each sample with its domain and row.

Every dataset of the `dataset` key is one domain, tokenized once by LLaMA-Factory's own processors. The row of a sample
is its row in that tokenized dataset. `val_size` splits the concatenation of all domains as LLaMA-Factory does, and the
rows it takes leave their domains.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import dataflex_mega.data.content_cache as content_cache
import dataflex_mega.data.dataset_info as dataset_info
from dataflex_mega.data.media import NO_MEDIA, Media, media_kinds
from dataflex_mega.data.pool import Domain, RowSource
from dataflex_mega.errors import DataError, did_you_mean
from dataflex_mega.llamafactory import media_rows, raw_rows, tokenized
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.pair_rows import PairRows
from dataflex_mega.llamafactory.processors import check_processor
from dataflex_mega.llamafactory.raw_rows import RawRows
from dataflex_mega.llamafactory.tokenized import DOMAIN, ROW, TokenizedData
from dataflex_mega.types import IGNORE_INDEX

ROWS_PER_COUNT = 10_000  # while target tokens are counted
# What LLaMA-Factory and `datasets` raise for rows that they cannot use.
FAILURES = (
    ValueError, KeyError, RuntimeError, StopIteration, TypeError, IndexError, AttributeError, OSError, SyntaxError,
)  # fmt: skip


@dataclass(frozen=True)
class DataBundle:
    """What training needs of the data: one Domain for each training dataset, and evaluation sets by name."""

    domains: list[Domain]
    evaluation: dict[str, RowSource]  # "" for the one evaluation set, else a name for each
    notes: tuple[str, ...] = ()  # what to say of the rows
    eval_names: tuple[str, ...] = ()  # datasets that the one evaluation set is made of; none with val_size

    @property
    def media(self) -> dict[str, tuple[str, ...]]:
        """Name -> images, videos, audios, of the training and evaluation sets that have any."""
        rows = {domain.name: domain.rows for domain in self.domains} | {
            name or "eval": rows for name, rows in self.evaluation.items()
        }
        return {name: kinds for name, source in rows.items() if (kinds := media_kinds(source))}


class DatasetRows:
    """Rows of a tokenized Hugging Face dataset as (input_ids, labels) arrays; memory-mapped, nothing is copied ahead."""

    def __init__(self, dataset: Any, unused: Sequence[str] = ()) -> None:
        columns = [name for name in ("input_ids", "labels") if name in dataset.column_names and name not in unused]
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._kinds = media_rows.kinds_of(dataset)
        self._media = dataset.select_columns(list(self._kinds)).with_format("arrow") if self._kinds else None
        # What is in which files: a fingerprint of `datasets` names a part of them, and what was done to it. It says nothing
        # of the files of media.
        self._files = [] if self._kinds else [Path(file["filename"]) for file in dataset.cache_files]
        self._key = f"{dataset._fingerprint} {' '.join(columns)} {len(dataset)}"

    @property
    def content(self) -> str | None:
        """The hash of all rows, where it was kept beside their files."""
        return content_cache.read(self._files, self._key) if self._files else None

    def keep_content(self, digest: str) -> None:
        """Keep the hash of all rows beside their files; rows in memory or with media have none."""
        if self._files:
            content_cache.write(self._files, self._key, digest)

    def __len__(self) -> int:
        return len(self._dataset)

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n pairs of int64 arrays (input_ids, labels), aligned position by position."""
        table = self._dataset[rows.tolist()]
        inputs = _arrays(table["input_ids"])
        if "labels" in table.column_names:
            labels = _arrays(table["labels"])
        else:
            # Pre-training rows have no padding yet, so every token is a target, as in a corpus. LLaMA-Factory's collator
            # leaves out all tokens that equal the padding token, which for many tokenizers is the end of a document.
            labels = inputs
        return list(zip(inputs, labels, strict=True))

    def media_kinds(self) -> tuple[str, ...]:
        """Which of images, videos and audios some row has."""
        return self._kinds

    def media(self, rows: np.ndarray) -> list[Media]:
        """[n] row numbers -> their images, videos and audio."""
        return [NO_MEDIA] * len(rows) if self._media is None else media_rows.read_media(self._media, rows)

    def read_block(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows first .. stop - 1 -> (their lengths, all their input_ids, all their labels), int64."""
        table = self._dataset[first:stop]
        lengths, ids = _flat(table["input_ids"])
        if "labels" in table.column_names:
            return lengths, ids, _flat(table["labels"])[1]
        return lengths, ids, ids

    def target_counts(self) -> np.ndarray:
        """[n] int64: target tokens of each row; see data.targets."""
        column = "labels" if "labels" in self._dataset.column_names else "input_ids"
        parts = [np.zeros(0, dtype=np.int64)]
        for first in range(0, len(self), ROWS_PER_COUNT):
            for chunk in self._dataset[first : min(first + ROWS_PER_COUNT, len(self))][column].chunks:
                values, ends = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
                is_target = np.concatenate([[0], np.cumsum(values != IGNORE_INDEX)])
                starts = np.minimum(ends[:-1] + 1, ends[1:])  # a row's first token has nothing before it
                parts.append(is_target[ends[1:]] - is_target[starts])
        return np.concatenate(parts)


def _arrays(column: Any) -> list[np.ndarray]:
    """A column of lists in Arrow's memory -> int64 arrays of their own.

    The numpy format of `datasets` would do the same, but up to 4.0 it fails beside a torchvision without VideoReader.
    """
    arrays = []
    for chunk in column.chunks:
        values, ends = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        arrays += [values[a:b].astype(np.int64) for a, b in itertools.pairwise(ends)]
    return arrays


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists in Arrow's memory -> ([rows] lengths, [values] all of them), int64."""
    ends = [chunk.offsets.to_numpy() for chunk in column.chunks]
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([np.diff(e) for e in ends]).astype(np.int64), np.concatenate(values).astype(np.int64)


def load_data(args: LFArgs, tokenizer_module: dict[str, Any], template: Any) -> DataBundle:
    """Tokenize and split, or read what tokenized_path holds. Raises DataError naming the dataset that is unknown, missing,
    broken or empty."""
    path = args.data.tokenized_path
    if path is not None and tokenized.is_saved(path):
        return make_bundle(tokenized.load(args, tokenizer_module["tokenizer"]), args)
    return make_bundle(tokenize(args, tokenizer_module, template), args)


def make_bundle(data: TokenizedData, args: LFArgs) -> DataBundle:
    """Tokenized datasets as domains and evaluation sets."""
    unused = ["labels"] if args.finetuning.stage == "pt" else []  # every token of a pre-training row is a target
    return DataBundle(
        domains=[Domain(name, _as_rows(rows, unused)) for name, rows in data.train.items()],
        evaluation={name: _as_rows(rows, unused) for name, rows in data.evaluation.items()},
        notes=tuple(dict.fromkeys(data.notes)),
        eval_names=tuple(args.data.eval_dataset or ()),
    )


def tokenize(args: LFArgs, tokenizer_module: dict[str, Any], template: Any) -> TokenizedData:
    """The datasets of the keys `dataset` and `eval_dataset`, through LLaMA-Factory's processors. Raises as `load_data`."""
    names = check_names(args.data.dataset, args.data.dataset_dir)
    eval_names = check_names(args.data.eval_dataset, args.data.dataset_dir)
    check_processor(args, tokenizer_module, template)
    load = _Loader(args, tokenizer_module, template)
    train, rows = {name: load(name) for name in names}, {}
    held_out: dict[str, Any] = {}
    if args.data.val_size > 1e-6:
        train, rows, held_out[""] = _split(train, args)
    if eval_names:
        from llamafactory.data.data_utils import merge_dataset

        held_out = {name: load(name) for name in eval_names}
        if not args.data.eval_on_each_dataset:
            held_out = {"": merge_dataset(list(held_out.values()), args.data, seed=args.training.seed)}
    return TokenizedData(train, held_out, rows, tuple(load.notes))


def _as_rows(dataset: Any, unused: Sequence[str]) -> RowSource:
    return PairRows(dataset) if PairRows.fits(dataset) else DatasetRows(dataset, unused)


def check_names(names: list[str] | None, dataset_dir: Any) -> list[str]:
    """The names: each is an entry of dataset_info.json and listed once. Raises DataError naming the first that is not."""
    if not names:
        return []
    from llamafactory.data.parser import get_dataset_list

    known = _known_names(dataset_dir)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"dataset: {name!r} is listed {names.count(name)} times")
        if known is not None and name not in known:
            raise DataError(f"dataset: {name!r} is not in {dataset_dir}/dataset_info.json{did_you_mean(name, known)}")
        if known is not None:
            dataset_info.check_entry(name, known[name], f"{dataset_dir}/dataset_info.json")
    try:
        entries = get_dataset_list(names, dataset_dir)
    except ValueError as error:
        raise DataError(f"dataset: {first_line(error)}") from error
    for name, attributes in zip(names, entries, strict=True):
        path = Path(dataset_dir) / attributes.dataset_name if isinstance(dataset_dir, str) else None
        if attributes.load_from == "file" and path is not None and not path.exists():
            raise DataError(f"dataset {name!r}: file {path} not found (named in {dataset_dir}/dataset_info.json)")
    return list(names)


def _known_names(dataset_dir: Any) -> dict[str, Any] | None:
    """Name -> entry of dataset_info.json; None where the names are those of a hub."""
    if isinstance(dataset_dir, dict):
        return dataset_dir
    if not isinstance(dataset_dir, str) or dataset_dir == "ONLINE" or dataset_dir.startswith("REMOTE:"):
        return None
    return dataset_info.read(Path(dataset_dir))


class _Loader:
    """One dataset name -> its tokenized dataset, through LLaMA-Factory's public `get_dataset`."""

    def __init__(self, args: LFArgs, tokenizer_module: dict[str, Any], template: Any) -> None:
        self.args, self.tokenizer_module, self.template = args, tokenizer_module, template
        self.notes: list[str] = []  # on the rows of the datasets that were loaded

    def __call__(self, name: str) -> Any:
        from llamafactory.data import get_dataset

        raw = raw_rows.read(self.args, name)
        if raw is not None:
            raw.check_columns()
            raw.check_answers()
            self.notes += raw.check_texts()
            media_rows.check_media(raw, self.args, self.template, self.tokenizer_module.get("processor"))
        data_args = copy.copy(self.args.data)  # never dataclasses.replace: its __post_init__ shortens cutoff_len again
        data_args.dataset, data_args.eval_dataset, data_args.val_size = [name], None, 0.0
        data_args.tokenized_path, data_args.interleave_probs = None, None
        if self.args.finetuning.stage == "sft":
            data_args.packing = data_args.neat_packing = (
                False  # rows are packed when a batch is made, so that ids survive
            )
        stage = raw_rows.DATA_STAGES.get(self.args.finetuning.stage, self.args.finetuning.stage)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints an example of every dataset, token by token
                data = get_dataset(
                    self.template, self.args.model, data_args, self.args.training, stage=stage, **self.tokenizer_module
                )
        except FAILURES as error:
            problem = raw and media_rows.first_media_problem(raw, self.args, decode=True)
            raise DataError(f"dataset {name!r}: {problem or diagnose(raw, error)}") from error
        rows: Any = data["train_dataset"]  # type: ignore[typeddict-item]  # not streaming, so a datasets.Dataset
        if raw is not None and (note := raw.dropped_note(len(rows))):
            self.notes.append(note)
        if len(rows) == 0:
            raise DataError(f"dataset {name!r}: no usable rows")
        return rows


def diagnose(raw: RawRows | None, error: BaseException) -> str:
    """What is wrong with a dataset that LLaMA-Factory could not use: file, row and key where they are known, else the
    error."""
    problem = None if raw is None else raw.first_problem()
    if problem:
        return problem
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {first_line(cause)}"


def _split(domains: dict[str, Any], args: LFArgs) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """Hold `val_size` of all rows out, as LLaMA-Factory does on the concatenation; domains keep what is left, in order.

    -> (what is left by name, which rows these are, what is held out).
    """
    from datasets import concatenate_datasets
    from llamafactory.data import split_dataset

    marked = [
        data.add_column(DOMAIN, [d] * len(data)).add_column(ROW, list(range(len(data))))
        for d, data in enumerate(domains.values())
    ]
    try:
        train, held_out = split_dataset(concatenate_datasets(marked), None, args.data, seed=args.training.seed)
    except ValueError as error:
        raise DataError(f"val_size {args.data.val_size}: {first_line(error)}") from error
    domain, row = np.asarray(train["train"][DOMAIN]), np.asarray(train["train"][ROW])
    rows = {name: np.sort(row[domain == d]) for d, name in enumerate(domains)}
    remaining = {name: data.select(rows[name]) for name, data in domains.items()}
    return remaining, rows, held_out["validation"].remove_columns([DOMAIN, ROW])
