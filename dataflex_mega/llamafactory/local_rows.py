"""Local copies of rows that LLaMA-Factory's own reader cannot reach as a run needs them: compressed files, and streams.

A run trains on rows by number. So a file that ends in .gz is unpacked into the cache of `datasets`, and of a stream as many
rows as the run needs are kept in `output_dir/stream`. Both end in a folder with a dataset_info.json of the same names,
which takes the place of `dataset_dir`; all that reads rows later sees files of a kind that it knows.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dataflex_mega.data.dataset_info as dataset_info
import dataflex_mega.json_text as json_text
from dataflex_mega.data.row_validation import first_bad_row
from dataflex_mega.errors import DataError
from dataflex_mega.files import atomic_file, atomic_write, remove_leftovers
from dataflex_mega.llamafactory.args import LFArgs, first_line

PACKED = ".gz"
DONE = "done.json"  # written last, so a folder without it is not used
FORM = ("columns", "tags", "formatting", "ranking")  # of an entry: what its rows look like
BLOCK = 1 << 20
UNREADABLE = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zlib.error)


@dataclass(frozen=True)
class LocalRows:
    """Arguments under which all rows are in local files, and which copy stands for which file."""

    args: LFArgs
    copies: Mapping[str, str]  # path of a copy -> the file that the configuration names

    def original_names(self, text: str) -> str:
        """A message with the names of the user's files in place of those of their copies."""
        for path, original in self.copies.items():
            text = text.replace(path, original)
        return text


def with_entries(args: LFArgs, entries: Mapping[str, Any], parent: Path) -> LFArgs:
    """The same arguments with these entries for a dataset_info.json, in a folder of `parent`; nothing is streamed."""
    folder = parent / f"info-{_digest(entries)}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / dataset_info.NAME).exists():
        atomic_write(folder / dataset_info.NAME, json.dumps(entries, indent=1) + "\n")
    data = copy.copy(args.data)  # never dataclasses.replace: its __post_init__ shortens cutoff_len again
    data.dataset_dir, data.streaming = str(folder), False
    return args._replace(data=data)


def local_entries(args: LFArgs, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> its entry of dataset_info.json with absolute paths; empty where dataset_dir is no folder."""
    folder = args.data.dataset_dir
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return {}
    known, entries = dataset_info.read(Path(folder)), {}
    for name in names:
        if isinstance(known.get(name), Mapping):
            entries[name] = dict(known[name])
            for key in ("file_name", "script_url"):
                if isinstance(entries[name].get(key), str):
                    entries[name][key] = str((Path(folder) / entries[name][key]).absolute())
    return entries


def all_names(args: LFArgs) -> list[str]:
    """Those of `dataset` and `eval_dataset`."""
    return [*(args.data.dataset or []), *(args.data.eval_dataset or [])]


# -- compressed files --------------------------------------------------------------------------------------------------


def unpack(args: LFArgs) -> LocalRows:
    """Unpack the .gz files of the datasets, once for each state of a file. Raises DataError for one that is damaged."""
    entries = local_entries(args, all_names(args))
    packed = {name: files for name, entry in entries.items() if (files := packed_files(name, entry))}
    if not packed:
        return LocalRows(args, {})
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(args.model.cache_dir or HF_DATASETS_CACHE).expanduser() / "dataflex_mega"
    copies: dict[str, str] = {}
    with args.training.main_process_first(desc="unpack", local=not args.data.data_shared_file_system):
        for name, files in packed.items():
            folder = cache / f"{name}-{_digest([_state(file) for file in files])}"
            for file in files:
                target = folder / file.name.removesuffix(PACKED)
                copies[str(target)] = str(file)
                if not target.exists():
                    _unpack_file(name, file, target)
            in_folder = Path(entries[name]["file_name"]).is_dir()
            entries[name]["file_name"] = str(folder if in_folder else folder / files[0].name.removesuffix(PACKED))
        return LocalRows(with_entries(args, entries, cache), copies)


def packed_files(name: str, entry: Mapping[str, Any]) -> list[Path]:
    """The files of an entry where they are compressed. Raises DataError for a folder of compressed files and others."""
    if not isinstance(entry.get("file_name"), str):
        return []
    path = Path(entry["file_name"])
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    packed = [file for file in files if file.suffix == PACKED and file.is_file()]
    if packed and len(packed) < len(files):
        other = next(file for file in files if file not in packed)
        raise DataError(
            f"dataset {name!r}: {path} holds {packed[0].name} and {other.name}; expected .gz files only, or none"
        )
    return packed


def _unpack_file(name: str, file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with gzip.open(file, "rb") as source, atomic_file(target) as stream:
            shutil.copyfileobj(source, stream, BLOCK)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"dataset {name!r}: {file} is damaged gz data: {first_line(error)}") from error


# -- streams -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamNeed:
    """How much of each dataset a run reads."""

    rows: int  # samples
    tokens: int | None = None  # all of them together, where a sample is a block of tokens; None: a row is a sample
    ended: bool = False  # whether the streams had no more


def stream_folder(args: LFArgs, output_dir: Path) -> Path:
    """Where the rows of these streams are kept: another dataset, file, seed or buffer has another folder."""
    names = list(args.data.dataset or [])
    entries = local_entries(args, names)
    files = [_state(file) for name in names for file in _files(entries.get(name, {}))]
    what = [names, entries, files, str(args.data.dataset_dir), args.data.buffer_size, args.training.seed]
    return output_dir / "stream" / _digest(what)


def read_kept(folder: Path) -> StreamNeed | None:
    """What was asked for when the rows in a folder were kept; None when they are not all there."""
    try:
        return StreamNeed(**json_text.read(folder / DONE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"streaming: {folder / DONE} cannot be read ({first_line(error)}); remove {folder}") from error


def keep_stream(args: LFArgs, folder: Path, need: StreamNeed, num_tokens: Callable[[str], float]) -> list[str]:
    """Read the streams of the `dataset` key, in the order of LLaMA-Factory's buffer, and keep their rows -> notes.

    Args:
        num_tokens: of a text, where the need is in tokens.

    Raises DataError naming a dataset that cannot be read, or a value that is no JSON.
    """
    from llamafactory.data.parser import get_dataset_list

    names, notes = list(args.data.dataset or []), []
    entries, ended = local_entries(args, names), True
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)  # of a run that was killed while it read
    for name, attributes in zip(names, get_dataset_list(names, args.data.dataset_dir), strict=True):
        count, more = 0, False
        with atomic_file(_kept_file(folder, name)) as stream:
            for line in _lines(args, name, attributes, entries.get(name, {}), need, num_tokens):
                more = line is None
                if line is not None:
                    stream.write(line)
                    count += 1
        if count == 0:
            raise DataError(f"dataset {name!r}: the stream has no rows")
        ended = ended and not more
        notes.append(f"streaming: {'the first' if more else 'all'} {count:,} rows of {name} are kept in {folder}")
    atomic_write(folder / DONE, json.dumps({**asdict(need), "ended": ended}) + "\n")
    return notes


def with_kept_rows(args: LFArgs, folder: Path) -> LFArgs:
    """Arguments that read the kept rows of `dataset` in place of the streams; evaluation sets are read as they are."""
    from llamafactory.data.parser import get_dataset_list

    names = list(args.data.dataset or [])
    given = local_entries(args, all_names(args))
    entries = {name: given.get(name, {"hf_hub_url": name}) for name in args.data.eval_dataset or []}
    for name, attributes in zip(names, get_dataset_list(names, args.data.dataset_dir), strict=True):
        form = {key: value for key, value in given.get(name, {}).items() if key in FORM}
        file = str(_kept_file(folder, name).absolute())
        entries[name] = {"formatting": attributes.formatting, **form, "file_name": file}
    return with_entries(args, entries, folder)


def _kept_file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_')}.jsonl"


def _lines(
    args: LFArgs,
    name: str,
    attributes: Any,
    entry: Mapping[str, Any],
    need: StreamNeed,
    num_tokens: Callable[[str], float],
) -> Iterator[bytes | None]:
    """Rows as lines of JSON, until the need is met, where None follows, or the stream ends."""
    try:
        rows = iter(_stream(args, name, attributes, _files(entry)))
        tokens, number = 0.0, 0
        while (need.tokens is None and number < need.rows) or (need.tokens is not None and tokens < need.tokens):
            row = next(rows, None)
            if row is None:
                return
            if need.tokens is not None:
                tokens += num_tokens(
                    "\n".join(str(row.get(c) or "") for c in (attributes.prompt, attributes.query) if c)
                )
            yield _json_line(name, number, row)
            number += 1
        yield None
    except DataError:
        raise
    except UNREADABLE as error:
        cause = error.__cause__ or error
        bad = next(filter(None, (first_bad_row(file, None) for file in _files(entry))), None)
        problem = bad or f"the stream cannot be read: {type(cause).__name__}: {first_line(cause)}"
        raise DataError(f"dataset {name!r}: {problem}") from error


def _json_line(name: str, number: int, row: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        column = next((c for c, value in row.items() if not _is_json(value)), "")
        kind = type(row.get(column)).__name__
        raise DataError(
            f"dataset {name!r}: row {number} of the stream: column {column!r} holds {kind}, which a stream cannot keep"
        ) from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _stream(args: LFArgs, name: str, attributes: Any, files: list[Path]) -> Any:
    from datasets import load_dataset
    from llamafactory.extras.constants import FILEEXT2TYPE

    common: dict[str, Any] = {"split": attributes.split, "cache_dir": args.model.cache_dir, "streaming": True}
    common |= {"name": attributes.subset, "data_dir": attributes.folder}
    if attributes.load_from == "file":
        suffixes = {(file.with_suffix("") if file.suffix == PACKED else file).suffix[1:] for file in files}
        kinds = {FILEEXT2TYPE.get(suffix) for suffix in suffixes}
        if len(kinds) != 1 or None in kinds:
            raise DataError(
                f"dataset {name!r}: expected files of one type of {', '.join(FILEEXT2TYPE)}, also as {PACKED}"
            )
        rows: Any = load_dataset(str(kinds.pop()), data_files=[str(file) for file in files], **common)
    elif attributes.load_from == "hf_hub":
        rows = load_dataset(attributes.dataset_name, token=args.model.hf_hub_token, **common)
    else:
        raise DataError(
            f"dataset {name!r}: streaming reads local files and datasets of the Hugging Face hub, not {attributes.load_from}"
        )
    if not hasattr(rows, "shuffle"):
        raise DataError(f"dataset {name!r}: split {attributes.split!r} is no single set of rows")
    return rows.shuffle(buffer_size=args.data.buffer_size, seed=args.training.seed)


# -- files -------------------------------------------------------------------------------------------------------------


def _files(entry: Mapping[str, Any]) -> list[Path]:
    """The local files of an entry with an absolute path, in the order of their names."""
    path = Path(entry["file_name"]) if isinstance(entry.get("file_name"), str) else None
    if path is None:
        return []
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _state(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
