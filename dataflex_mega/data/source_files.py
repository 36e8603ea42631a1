"""The files of a local dataset: whether they can be read at all, and in which of them a row is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dataflex_mega.errors import DataError

SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")  # what save_to_disk writes beside its rows


def check_files(what: str, path: Path, types: Mapping[str, str]) -> list[Path]:
    """The files of a dataset, in the order in which LLaMA-Factory reads them.

    Args:
        what: the dataset, as messages name it.
        path: a file, or a folder of files of one type.
        types: file name extension -> type.

    Raises:
        DataError: a folder that is empty or holds what is no file of rows, or a file of a type that is not read or empty.
    """
    expected = f"expected {', '.join(types)}"
    if not path.is_dir():
        files = [path]
    else:
        if any((path / name).is_file() for name in SAVED_BY_DATASETS):
            raise DataError(
                f"{what}: {path} was written by Dataset.save_to_disk; expected a file or a folder of files of one type "
                f"({', '.join(types)}): write the rows with Dataset.to_json or to_parquet, or name its .arrow file"
            )
        files = list(path.iterdir())
        if not files:
            raise DataError(f"{what}: {path} is an empty folder; {expected} files in it")
    kinds: dict[str, Path] = {}
    for file in sorted(files):
        if file.is_dir():
            raise DataError(f"{what}: {path} holds a folder, {file.name}; {expected} files in it and nothing else")
        kind = types.get(file.suffix[1:])
        if kind is None:
            beside = "; move it out of the folder" if path.is_dir() and len(files) > 1 else ""
            raise DataError(f"{what}: {file} is of no type that can be read, {expected}{beside}")
        if file.stat().st_size == 0:
            raise DataError(f"{what}: {file} is empty")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        names = " and ".join(file.name for file in kinds.values())
        raise DataError(f"{what}: {path} holds files of different types, {names}; {expected}, all of one type")
    return files


def location(files: list[Path], row: int, count_rows: Callable[[Path], int]) -> str:
    """`FILE, line 3` of a file of lines, else `FILE, row 2`; `row 2` without files. Rows count from 0, lines from 1."""
    if not files:
        return f"row {row}"
    for file in files[:-1]:
        rows = count_rows(file)
        if row < rows:
            break
        row -= rows
    else:
        file = files[-1]
    line = _line_of(file, row)
    return f"{file}, row {row}" if line is None else f"{file}, line {line}"


def _line_of(file: Path, row: int) -> int | None:
    """The number of the line that holds a row of a .jsonl or .txt file; None for other files and arrays."""
    if file.suffix not in (".json", ".jsonl", ".txt"):
        return None
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if file.suffix != ".txt" and not line.strip():
                continue
            if file.suffix != ".txt" and number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                return None
            if row == 0:
                return number
            row -= 1
    return None
