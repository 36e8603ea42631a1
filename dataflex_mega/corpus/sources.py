"""Input files: which rows they have, and the text and domain of a row. Nothing is ever read whole.

A piece is the part of a file that one unit of work reads: bytes of plain JSON lines, row groups of parquet, a whole file
where neither can be entered in the middle (compressed lines, a JSON array).
"""

from __future__ import annotations

import codecs
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dataflex_mega.errors import ConfigError, DataError, did_you_mean

KINDS = {
    ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet",
    ".jsonl.gz": "gz", ".json.gz": "gz", ".jsonl.zst": "zst", ".json.zst": "zst", ".jsonl.zstd": "zst",
}  # fmt: skip
CHUNK = 1 << 17  # bytes read at once from a compressed file


@dataclass(frozen=True)
class Rule:
    """Where a row's text and domain are. Field names may be dotted: `meta.redpajama_set_name`."""

    text: tuple[str, ...] = ("text",)  # the first must be there; the others are joined to it by a newline
    domain: str | None = None  # the domain of every row
    domain_field: str | None = None  # or the field that names it


@dataclass(frozen=True)
class Source:
    """An input file."""

    path: str
    kind: str  # a value of KINDS
    size: int  # bytes
    rule: Rule


@dataclass(frozen=True)
class Piece:
    """Part of a source: bytes [start, stop) of a .jsonl (a line belongs where it begins), row groups of a parquet file.
    The whole file for the other kinds."""

    source: Source
    number: int  # of the source among all
    start: int
    stop: int
    size: int  # bytes, for progress


@dataclass(frozen=True)
class Row:
    """One row as read: its value, or why it has none."""

    value: Any = None
    problem: str | None = None


def make_source(path: Path, rule: Rule) -> Source:
    """A file as a source, its kind found by its name. Raises DataError for a kind that cannot be read."""
    name = path.name.lower()
    suffix = next((s for s in sorted(KINDS, key=len, reverse=True) if name.endswith(s)), None)
    if suffix is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    kind = KINDS[suffix]
    if kind == "json" and not _is_array(path):
        kind = "jsonl"
    if kind == "parquet":
        _check_columns(path, rule)
    return Source(str(path), kind, path.stat().st_size, rule)


def _is_array(path: Path) -> bool:
    with path.open("rb") as stream:
        return next((c for c in iter(lambda: stream.read(1), b"") if not c.isspace()), b"") == b"["


# -- rows --------------------------------------------------------------------------------------------------------------


def read_rows(piece: Piece, longest: int) -> Iterator[Row]:
    """The rows of a piece in order, bad ones too. Raises DataError where the file itself is broken.

    Args:
        piece: what to read.
        longest: bytes of the longest line that is read; a longer one is a bad row, so memory stays bounded.
    """
    path, kind = Path(piece.source.path), piece.source.kind
    try:
        if kind == "parquet":
            yield from _parquet_rows(piece)
        elif kind == "json":
            with path.open("rb") as stream:
                yield from _array_rows(stream, piece.source.path, longest)
        elif kind == "jsonl":
            with path.open("rb") as stream:
                yield from _line_rows(stream, piece.start, piece.stop, longest)
        else:
            with path.open("rb") as stream, io.BufferedReader(_Chunks(_unpacked(stream, piece.source)), CHUNK) as lines:
                yield from _line_rows(lines, 0, None, longest)
    except FileNotFoundError:
        raise DataError(f"{path} not found") from None


def _line_rows(stream: Any, start: int, stop: int | None, longest: int) -> Iterator[Row]:
    """Rows of the lines that begin in [start, stop)."""
    position = start
    if start:
        stream.seek(start - 1)
        position += _skip_line(stream, longest) - 1  # the line that began before; only a newline where it ended there
    while stop is None or position < stop:
        line = stream.readline(longest + 1)
        if not line:
            return
        position += len(line)
        if len(line) > longest and not line.endswith(b"\n"):
            position += _skip_line(stream, longest)
            yield Row(problem=f"longer than {longest} bytes")
        else:
            yield _parsed(line)


def _skip_line(stream: Any, longest: int) -> int:
    """Read up to and with the next newline -> how many bytes that were."""
    passed = 0
    while part := stream.readline(longest):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _parsed(line: bytes) -> Row:
    if not line.strip():
        return Row(problem="an empty line")
    try:
        return Row(json.loads(line))
    except json.JSONDecodeError as error:
        return Row(problem=f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return Row(problem=f"not UTF-8: byte {error.start}")
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        return Row(problem=f"not JSON that can be read: {type(error).__name__}")


class _Chunks(io.RawIOBase):
    """A generator of bytes as a file, so that io.BufferedReader can cut it into lines."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            more = next(self._chunks, None)
            if more is None:
                return 0
            self._rest = more
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _unpacked(stream: BinaryIO, source: Source) -> Iterator[bytes]:
    """The bytes of a .gz or .zst file, all its frames. Raises DataError when it is damaged or cut short."""
    make, broken = _decoder(source.kind)
    decoder: Any = None
    while chunk := stream.read(CHUNK):
        while chunk:
            decoder = make() if decoder is None else decoder
            try:
                yield decoder.decompress(chunk)
            except broken as error:
                raise DataError(f"{source.path}: damaged {source.kind} data: {error}") from error
            if not decoder.eof:
                break
            chunk, decoder = decoder.unused_data, None
    if decoder is not None:
        raise DataError(f"{source.path}: the {source.kind} data ends in the middle")


def _decoder(kind: str) -> tuple[Any, type[Exception]]:
    """(maker of decompressors, what they raise)."""
    if kind == "gz":
        return (lambda: zlib.decompressobj(wbits=31)), zlib.error
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f'reading .zst needs zstandard: pip install "dataflex_mega[offline]" ({error})') from error
    return (lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()), zstandard.ZstdError


def _array_rows(stream: BinaryIO, path: str, longest: int) -> Iterator[Row]:
    """The elements of a JSON array. A syntax error ends the file, since nothing says where the next element begins."""
    text = _Array(stream, path)
    text.take("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.take(",")
        yield Row(text.element(longest))
        number = text.number = number + 1


class _Array:
    """The text of a JSON array, of which only the part around the next element is in memory."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self.number = 0  # of the next element, for errors
        self._stream, self._path = stream, path
        self._decode, self._parse = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(CHUNK)

    def take(self, wanted: str) -> None:
        """Step over `wanted`, which must come next."""
        found = self.peek()
        if found != wanted:
            raise self._broken(f"expected {wanted!r}, found {found!r}" if found else "the array does not end")
        self._at += 1

    def element(self, longest: int) -> Any:
        """The next element. Raises DataError for a syntax error or when it is longer than `longest` characters."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, self._at = self._parse(self._text, self._at)
                return value
            except json.JSONDecodeError as error:  # broken, or not all of it is here yet
                if self._ended or len(self._text) - self._at > longest:
                    raise self._broken(error.msg) from error
            self._more(size)
            size *= 2

    def _more(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._broken(f"not UTF-8: {error.reason}") from error
        self._at = 0

    def _broken(self, what: str) -> DataError:
        return DataError(f"{self._path}, row {self.number}: not JSON: {what}")


# -- parquet -----------------------------------------------------------------------------------------------------------


def columns(rule: Rule) -> list[str]:
    """The top-level columns that a rule needs."""
    needed = [*rule.text, *([rule.domain_field] if rule.domain_field else [])]
    return list(dict.fromkeys(needed))


def _check_columns(path: Path, rule: Rule) -> None:
    known = list(open_parquet(path).schema_arrow.names)
    required = [rule.text[0], *([rule.domain_field] if rule.domain_field else [])]
    for name in required:
        if name not in known and name.partition(".")[0] not in known:
            raise DataError(f"{path}: no column {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")


def open_parquet(path: str | Path) -> Any:
    """A pyarrow ParquetFile that reads what it is asked for and nothing ahead. Raises DataError for a damaged file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file that can be read: {str(error).splitlines()[0]}") from error


def _parquet_rows(piece: Piece) -> Iterator[Row]:
    import pyarrow

    file = open_parquet(piece.source.path)
    known = set(file.schema_arrow.names)
    wanted = [name if name in known else name.partition(".")[0] for name in columns(piece.source.rule)]
    groups = list(range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(256, row_groups=groups, columns=[name for name in wanted if name in known]):
            for value in batch.to_pylist():
                yield Row(value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{piece.source.path}: damaged parquet data: {str(error).splitlines()[0]}") from error


# -- text and domain ---------------------------------------------------------------------------------------------------


def extract(value: Any, rule: Rule) -> tuple[str, str] | str:
    """A row -> (text, domain), or in words why it has none."""
    if not isinstance(value, dict):
        return f"expected an object, found {type(value).__name__}"
    parts = []
    for place, name in enumerate(rule.text):
        part = lookup(value, name)
        if part is None and place == 0:
            return f"no field {name!r}"
        if part is not None and not isinstance(part, str):
            return f"field {name!r}: expected text, found {type(part).__name__}"
        if part:
            parts.append(part)
    text = "\n".join(parts)
    if not text.strip():
        return f"field {rule.text[0]!r} is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"field {rule.text[0]!r} has half of a surrogate pair, which is no character"
    domain = rule.domain
    if rule.domain_field is not None:
        domain = lookup(value, rule.domain_field)
        if domain is None:
            return f"no field {rule.domain_field!r}, which names the domain"
        if not isinstance(domain, str) or not domain.strip():
            return f"field {rule.domain_field!r}: expected the name of a domain, found {domain!r:.60}"
    assert domain is not None
    return text, domain


def lookup(value: dict[str, Any], name: str) -> Any:
    """`meta.source` as a key of that very name, else as `source` of the mapping `meta`; None where there is none."""
    if name in value:
        return value[name]
    found: Any = value
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
