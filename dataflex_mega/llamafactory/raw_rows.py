"""Rows as they are in their files, checked before LLaMA-Factory brings them into its own form.

Some mistakes LLaMA-Factory trains without a word: a pre-training row without text becomes a document of nothing but its end,
and a row that does not fit is dropped. Those are looked for in all rows, column by column. Where it fails, the row that it
failed on is looked for one by one; nothing is read twice in a run that is in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.data.row_validation import first_bad_row
from dataflex_mega.data.source_files import check_files, location
from dataflex_mega.errors import DataError, did_you_mean
from dataflex_mega.llamafactory.args import LFArgs, first_line
from dataflex_mega.llamafactory.row_format import row_problem

MAPPED = ("prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios")
PAIRED = ("chosen", "rejected")
# Stage -> the one whose rows LLaMA-Factory makes for it, where it is another.
DATA_STAGES: dict[str, Any] = {"dpo": "rm"}
ALPACA_ONLY, MESSAGES_ONLY = {"prompt", "query", "response", "history"}, {"messages"}


@dataclass(frozen=True)
class RawRows:
    """The rows of one dataset, a Hugging Face dataset with the columns of the files."""

    name: str
    attributes: Any  # LLaMA-Factory's DatasetAttr
    stage: str
    files: list[Path]  # empty where the rows are not from local files
    rows: Any  # datasets.Dataset, before max_samples
    num_used: int  # rows after num_samples and max_samples

    def where(self, row: int) -> str:
        """`data/d.jsonl, line 3`, or `row 2` where the file is not known."""
        return location(self.files, row, lambda file: len(_load(self.attributes, [file])))

    def check_columns(self) -> None:
        """Raises DataError for a column that dataset_info.json names, or LLaMA-Factory by default, and no row has."""
        attributes, known = self.attributes, self.rows.column_names
        absent = MESSAGES_ONLY if attributes.formatting == "alpaca" else ALPACA_ONLY
        optional = {"system", "tools"} if attributes.formatting == "openai" else set()
        absent = absent | {"response"} if attributes.ranking else absent
        for key in (*MAPPED, *PAIRED) if attributes.ranking else MAPPED:
            column = getattr(attributes, key, None)
            if key in PAIRED and column is None:
                example = '"columns": {"chosen": "chosen", "rejected": "rejected"}'
                raise DataError(
                    f"dataset {self.name!r}: columns in dataset_info.json names no {key}, such as {example}"
                )
            if key in absent or key in optional or column is None or column in known:
                continue
            raise DataError(
                f"dataset {self.name!r}: {self.where(0)}: no {column!r} (columns.{key} in dataset_info.json)"
                f"{did_you_mean(column, known)}; the rows have {', '.join(known) or 'nothing'}"
            )
        if attributes.formatting == "alpaca" and self.stage == "pt" and not (attributes.prompt or attributes.query):
            example = '"columns": {"prompt": "text"}'
            raise DataError(f"dataset {self.name!r}: columns in dataset_info.json names no prompt, such as {example}")

    def check_texts(self) -> list[str]:
        """Notes on prompts that are empty. Raises DataError for pre-training rows without text, with their count."""
        columns = [getattr(self.attributes, key) for key in self._text_keys()]
        columns = [column for column in columns if column]
        if not columns:
            return []
        blank = np.ones(self.num_checked(), dtype=bool)
        for column in columns:
            blank &= self._blank(column)
        if not blank.any():
            return []
        first, of = int(np.flatnonzero(blank)[0]), f"{int(blank.sum()):,} of {len(blank):,} rows"
        value = " and ".join(f"{c!r} is {self._shown(first, c)}" for c in columns)
        if self.stage == "pt":
            raise DataError(
                f"dataset {self.name!r}: {of} have no text; the first is {self.where(first)}: {value}. Remove these rows: "
                "each would be trained as an empty document"
            )
        return [f"dataset {self.name!r}: {of} have an empty prompt; the first is {self.where(first)}: {value}"]

    def check_answers(self) -> None:
        """Raises DataError for a chosen or a rejected message that is no answer: LLaMA-Factory only warns, and trains it."""
        import pyarrow
        import pyarrow.compute

        compute: Any = pyarrow.compute
        attributes = self.attributes
        if not attributes.ranking or attributes.formatting == "alpaca":
            return
        allowed = [tag for tag in (attributes.assistant_tag, attributes.function_tag) if tag]
        for column in (attributes.chosen, attributes.rejected):
            values = self.rows.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
            if not pyarrow.types.is_struct(values.type) or values.type.get_field_index(attributes.role_tag) < 0:
                continue  # LLaMA-Factory fails on it, and then the row is looked for
            roles = compute.struct_field(values, [attributes.role_tag])
            wrong = compute.and_(compute.is_valid(roles), compute.invert(compute.is_in(roles, pyarrow.array(allowed))))
            rows = np.flatnonzero(wrong.to_numpy(zero_copy_only=False)[: self.num_checked()])
            if len(rows):
                problem = row_problem(self.rows[int(rows[0])], attributes, self.stage)
                raise DataError(f"dataset {self.name!r}: {self.where(int(rows[0]))}: {problem}")

    def first_problem(self) -> str | None:
        """Where the first row is that LLaMA-Factory cannot read or drops, and why; None when none is found."""
        for row, values in self._numbered():
            problem = row_problem(values, self.attributes, self.stage)
            if problem:
                return f"{self.where(row)}: {problem}"
        return None

    def dropped_note(self, num_left: int) -> str | None:
        """What to say of the rows that LLaMA-Factory dropped; None when it dropped none."""
        dropped = self.num_used - num_left
        if dropped <= 0 or self.stage == "pt":  # rows of stage pt may be blocks of several
            return None
        problem = self.first_problem()
        first = f" (first: {problem})" if problem else ""
        return f"dataset {self.name!r}: {dropped:,} of {self.num_used:,} rows were dropped{first}"

    def _text_keys(self) -> tuple[str, ...]:
        return ("prompt", "query") if self.attributes.formatting == "alpaca" else ()

    def num_checked(self) -> int:
        """Rows that may be trained: all of them where a random sample is drawn."""
        return len(self.rows) if self.attributes.num_samples is not None else min(self.num_used, len(self.rows))

    def _blank(self, column: str) -> np.ndarray:
        """[n] bool: null, empty or white space. Raises DataError for a column that is no text."""
        import pyarrow
        import pyarrow.compute

        compute: Any = pyarrow.compute  # its functions are made when it is imported
        parts, count = [], self.num_checked()
        table = self.rows.select_columns([column]).with_format("arrow")
        for first in range(0, count, 10_000):
            values = table[first : min(first + 10_000, count)][column]
            if pyarrow.types.is_null(values.type):
                parts.append(np.ones(len(values), dtype=bool))
                continue
            if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
                found = f"found {values.type} {self._shown(first, column)}"
                raise DataError(f"dataset {self.name!r}: {self.where(first)}: {column!r} must be text, {found}")
            try:
                trimmed = compute.binary_length(compute.utf8_trim_whitespace(values))
            except pyarrow.ArrowInvalid as error:  # the reader takes any bytes for text
                problem = (
                    _first_bad_row(self.files) or f"rows {first} to {first + len(values) - 1}: {column!r} is not UTF-8"
                )
                raise DataError(f"dataset {self.name!r}: {problem}") from error
            parts.append(compute.fill_null(compute.equal(trimmed, 0), True).to_numpy().astype(bool))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _shown(self, row: int, column: str) -> str:
        value = self.rows[row][column]
        text = "null" if value is None else repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in range(self.num_checked()):
            yield row, self.rows[row]


def read(args: LFArgs, name: str) -> RawRows | None:
    """The rows of a dataset, checked as far as it can be done without LLaMA-Factory; None for sources that only it reads.

    Raises DataError naming the folder or file that cannot be read.
    """
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.extras.constants import FILEEXT2TYPE

    attributes = get_dataset_list([name], args.data.dataset_dir)[0]
    pairs = DATA_STAGES.get(args.finetuning.stage) == "rm"
    if attributes.ranking != pairs:
        found = f"found stage: {args.finetuning.stage}"
        missing = f'stage: dpo needs pairs of answers, "ranking": true in dataset_info.json; {found}'
        raise DataError(f"dataset {name!r}: {missing if pairs else f'ranking: true is of stages rm and dpo, {found}'}")
    files: list[Path] = []
    if attributes.load_from == "file" and isinstance(args.data.dataset_dir, str):
        path = Path(args.data.dataset_dir) / attributes.dataset_name
        files = check_files(f"dataset {name!r}", path, FILEEXT2TYPE)
    elif attributes.load_from != "hf_hub":
        return None
    options = {"cache_dir": args.model.cache_dir, "num_proc": args.data.preprocessing_num_workers}
    options["token"] = args.model.hf_hub_token
    with args.training.main_process_first(desc="read rows", local=not args.data.data_shared_file_system):
        rows = _load_or_say(name, attributes, files, options)
    if not hasattr(rows, "__len__"):  # a split of several
        return None
    if len(rows) == 0:
        source = f": {files[0] if len(files) == 1 else files[0].parent} has no rows" if files else " has no rows"
        raise DataError(f"dataset {name!r}{source}")
    used = len(rows) if attributes.num_samples is None else int(attributes.num_samples)
    used = used if args.data.max_samples is None else min(used, int(args.data.max_samples))
    return RawRows(name, attributes, args.finetuning.stage, files, rows, used)


def _load_or_say(name: str, attributes: Any, files: list[Path], options: dict[str, Any]) -> Any:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    errors = (DatasetGenerationError, DatasetNotFoundError, ValueError, KeyError, RuntimeError, TypeError, OSError)
    try:
        return _load(attributes, files, options)
    except errors as error:
        cause = error.__cause__ or error
        problem = _first_bad_row(files)
        if problem:
            raise DataError(f"dataset {name!r}: {problem}") from error
        source = f"{files[0] if len(files) == 1 else files[0].parent} cannot be read: " if files else ""
        raise DataError(f"dataset {name!r}: {source}{type(cause).__name__}: {first_line(cause)}") from error


def _first_bad_row(files: list[Path]) -> str | None:
    return next(filter(None, (first_bad_row(file, None) for file in files)), None)


def _load(attributes: Any, files: list[Path], options: dict[str, Any] | None = None) -> Any:
    """As LLaMA-Factory loads them, so that the rows are in its cache."""
    from datasets import load_dataset
    from llamafactory.extras.constants import FILEEXT2TYPE

    common: dict[str, Any] = {"split": attributes.split, **(options or {})}
    if files:
        kind = FILEEXT2TYPE[files[0].suffix[1:]]
        subset = {"name": attributes.subset, "data_dir": attributes.folder}
        return load_dataset(kind, data_files=[str(file) for file in files], **subset, **common)
    return load_dataset(attributes.dataset_name, name=attributes.subset, data_dir=attributes.folder, **common)
