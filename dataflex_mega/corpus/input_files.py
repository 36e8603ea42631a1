"""Input files: their rows, and the text and domain of a row. No file is read into memory as a whole.

A slice is the part of a file that one unit of work reads: bytes of plain JSON lines, row groups of parquet, or the whole
file where reading cannot begin in the middle (compressed lines, a JSON array).
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

# Suffix -> kind: how the file is compressed, if it is, and after a colon what it holds, where that is not lines of JSON.
KINDS = {
    ".jsonl": "jsonl", ".json": "json", ".parquet": "parquet", ".txt": "txt",
    ".jsonl.gz": "gz", ".json.gz": "gz", ".jsonl.zst": "zst", ".json.zst": "zst", ".jsonl.zstd": "zst",
    ".txt.gz": "gz:txt", ".txt.zst": "zst:txt", ".txt.zstd": "zst:txt",
}  # fmt: skip
BEFORE_ARRAY = b"\xef\xbb\xbf \t\r\n"
TEXT = "text"  # the field of a line of a .txt file
CHUNK = 1 << 17  # bytes read at once from a compressed file


@dataclass(frozen=True)
class FieldRule:
    """The fields of a row's text and domain. Their names may be dotted: `meta.redpajama_set_name`."""

    text: tuple[str, ...] = ("text",)  # the first is required; the others are joined to it by a newline
    domain: str | None = None  # the domain of every row
    domain_field: str | None = None  # or the field that names it


@dataclass(frozen=True)
class InputFile:
    """An input file and the rule for its rows."""

    path: str
    kind: str  # a value of KINDS, or one of those of compressed lines with `:json` where they are an array
    size: int  # bytes
    rule: FieldRule


@dataclass(frozen=True)
class FileSlice:
    """Part of a file: bytes [start, stop) of a .jsonl (a line belongs to the slice in which it begins), row groups of a
    parquet file. The whole file for the other kinds."""

    input_file: InputFile
    number: int  # of the file among all
    start: int
    stop: int
    size: int  # bytes, for progress


@dataclass(frozen=True)
class InputRow:
    """One row: its value, or the problem for which it has none."""

    value: Any = None
    problem: str | None = None


def open_input(path: Path, rule: FieldRule) -> InputFile:
    """Recognize a file's kind by its name. Raises DataError for a kind that cannot be read."""
    name = path.name.lower()
    suffix = next((s for s in sorted(KINDS, key=len, reverse=True) if name.endswith(s)), None)
    if suffix is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    kind = KINDS[suffix]
    if kind == "json" and not _is_array(path):
        kind = "jsonl"
    if kind == "parquet":
        _check_columns(path, rule)
    file = InputFile(str(path), kind, path.stat().st_size, rule)
    if kind in ("gz", "zst") and suffix.startswith(".json.") and _is_packed_array(file):
        return InputFile(file.path, f"{kind}:json", file.size, rule)
    return file


def _is_packed_array(file: InputFile) -> bool:
    """Damage is left to be found where the rows are read."""
    try:
        with Path(file.path).open("rb") as stream:
            chunks = (chunk.lstrip(BEFORE_ARRAY) for chunk in _decompress(stream, file))
            return next((chunk[:1] for chunk in chunks if chunk), b"") == b"["
    except DataError:
        return False


def _is_array(path: Path) -> bool:
    with path.open("rb") as stream:
        return next((c for c in iter(lambda: stream.read(1), b"") if not c.isspace()), b"") == b"["


# -- rows --------------------------------------------------------------------------------------------------------------


def read_rows(file_slice: FileSlice, max_bytes: int) -> Iterator[InputRow]:
    """The rows of a slice in order, bad ones too. Raises DataError where the file itself is broken.

    A line of more than `max_bytes` is a bad row, so memory stays bounded.
    """
    file = file_slice.input_file
    path, kind = Path(file.path), file.kind
    try:
        if kind == "parquet":
            yield from _parquet_rows(file_slice)
        elif kind == "json":
            with path.open("rb") as stream:
                yield from _array_rows(stream, file.path, max_bytes)
        elif kind == "txt":
            with path.open("rb") as stream:
                yield from _text_rows(stream, max_bytes)
        elif kind == "jsonl":
            with path.open("rb") as stream:
                yield from _line_rows(stream, file_slice.start, file_slice.stop, max_bytes)
        else:
            with (
                path.open("rb") as stream,
                io.BufferedReader(_ChunkStream(_decompress(stream, file)), CHUNK) as content,
            ):
                yield from _packed_rows(content, file, max_bytes)
    except FileNotFoundError:
        raise DataError(f"{path} not found") from None


def _packed_rows(content: Any, file: InputFile, max_bytes: int) -> Iterator[InputRow]:
    held = file.kind.partition(":")[2]
    if held == "json":
        yield from _array_rows(content, file.path, max_bytes)
    elif held == "txt":
        yield from _text_rows(content, max_bytes)
    else:
        yield from _line_rows(content, 0, None, max_bytes)


def _text_rows(stream: Any, max_bytes: int) -> Iterator[InputRow]:
    """Each line that is not empty is the text of a row, as the text files of `datasets` are read."""
    while line := stream.readline(max_bytes + 1):
        if len(line) > max_bytes and not line.endswith(b"\n"):
            _skip_line(stream, max_bytes)
            yield InputRow(problem=f"longer than {max_bytes} bytes")
        elif line.strip():
            try:
                yield InputRow({TEXT: line.rstrip(b"\r\n").decode("utf-8-sig")})
            except UnicodeDecodeError as error:
                yield InputRow(problem=f"not UTF-8: byte {error.start}")


def _line_rows(stream: Any, start: int, stop: int | None, max_bytes: int) -> Iterator[InputRow]:
    """Rows of the lines that begin in [start, stop)."""
    position = start
    if start:
        stream.seek(start - 1)
        position += _skip_line(stream, max_bytes) - 1  # the line that began before; only a newline where it ended there
    while stop is None or position < stop:
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        position += len(line)
        if len(line) > max_bytes and not line.endswith(b"\n"):
            position += _skip_line(stream, max_bytes)
            yield InputRow(problem=f"longer than {max_bytes} bytes")
        else:
            yield _parse_line(line)


def _skip_line(stream: Any, max_bytes: int) -> int:
    """Read up to and with the next newline -> the number of bytes read."""
    num_bytes = 0
    while chunk := stream.readline(max_bytes):
        num_bytes += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return num_bytes


def _parse_line(line: bytes) -> InputRow:
    if not line.strip():
        return InputRow(problem="an empty line")
    try:
        return InputRow(json.loads(line))
    except json.JSONDecodeError as error:
        return InputRow(problem=f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return InputRow(problem=f"not UTF-8: byte {error.start}")
    except (RecursionError, ValueError) as error:  # nested too deep; a number of thousands of digits
        return InputRow(problem=f"not JSON that can be read: {type(error).__name__}")


class _ChunkStream(io.RawIOBase):
    """A generator of bytes as a file, so that io.BufferedReader can split it into lines."""

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


def _decompress(stream: BinaryIO, file: InputFile) -> Iterator[bytes]:
    """The content of a .gz or .zst file, of all its frames. Raises DataError when it is damaged or truncated."""
    compression = file.kind.partition(":")[0]
    make_decoder, decoder_error = _decoder(compression)
    decoder: Any = None
    while chunk := stream.read(CHUNK):
        while chunk:
            decoder = make_decoder() if decoder is None else decoder
            try:
                yield decoder.decompress(chunk)
            except decoder_error as error:
                raise DataError(f"{file.path}: damaged {compression} data: {error}") from error
            if not decoder.eof:
                break
            chunk, decoder = decoder.unused_data, None
    if decoder is not None:
        raise DataError(f"{file.path}: the {compression} data ends in the middle")


def _decoder(kind: str) -> tuple[Any, type[Exception]]:
    """(a function that makes a decompressor, the exception that it raises)."""
    if kind == "gz":
        return (lambda: zlib.decompressobj(wbits=31)), zlib.error
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f'reading .zst needs zstandard: pip install "dataflex_mega[offline]" ({error})') from error
    return (lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()), zstandard.ZstdError


def _array_rows(stream: BinaryIO, path: str, max_bytes: int) -> Iterator[InputRow]:
    """The elements of a JSON array. A syntax error ends the file, since nothing says where the next element begins."""
    text = _Array(stream, path)
    text.take("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.take(",")
        yield InputRow(text.element(max_bytes))
        number = text.number = number + 1


class _Array:
    """The text of a JSON array; only the characters around the next element are in memory."""

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
            self._read_more(CHUNK)

    def take(self, expected: str) -> None:
        """Step over the character `expected`. Raises DataError when another one comes next."""
        found = self.peek()
        if found != expected:
            raise self._error(f"expected {expected!r}, found {found!r}" if found else "the array does not end")
        self._at += 1

    def element(self, max_bytes: int) -> Any:
        """The next element. Raises DataError for a syntax error or when it is longer than `max_bytes` characters."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, self._at = self._parse(self._text, self._at)
                return value
            except json.JSONDecodeError as error:  # broken, or not all of it is here yet
                if self._ended or len(self._text) - self._at > max_bytes:
                    raise self._error(error.msg) from error
            self._read_more(size)
            size *= 2

    def _read_more(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            self._text = self._text[self._at :] + self._decode.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8: {error.reason}") from error
        self._at = 0

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self._path}, row {self.number}: not JSON: {problem}")


# -- parquet -----------------------------------------------------------------------------------------------------------


def columns(rule: FieldRule) -> list[str]:
    """The fields that a rule reads."""
    needed = [*rule.text, *([rule.domain_field] if rule.domain_field else [])]
    return list(dict.fromkeys(needed))


def _check_columns(path: Path, rule: FieldRule) -> None:
    known = list(open_parquet(path).schema_arrow.names)
    required = [rule.text[0], *([rule.domain_field] if rule.domain_field else [])]
    for name in required:
        if name not in known and name.partition(".")[0] not in known:
            raise DataError(f"{path}: no column {name!r}{did_you_mean(name, known)}; it has {', '.join(known)}")


def open_parquet(path: str | Path) -> Any:
    """A pyarrow ParquetFile that reads nothing ahead. Raises DataError for a damaged file."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file that can be read: {str(error).splitlines()[0]}") from error


def _parquet_rows(file_slice: FileSlice) -> Iterator[InputRow]:
    import pyarrow

    path, rule = file_slice.input_file.path, file_slice.input_file.rule
    parquet = open_parquet(path)
    known = set(parquet.schema_arrow.names)
    names = [name if name in known else name.partition(".")[0] for name in columns(rule)]
    groups = list(range(file_slice.start, file_slice.stop))
    try:
        for batch in parquet.iter_batches(256, row_groups=groups, columns=[name for name in names if name in known]):
            for value in batch.to_pylist():
                yield InputRow(value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet data: {str(error).splitlines()[0]}") from error


# -- text and domain ---------------------------------------------------------------------------------------------------


def extract(value: Any, rule: FieldRule) -> tuple[str, str] | str:
    """A row -> (text, domain), or the problem for which it has none."""
    if not isinstance(value, dict):
        return f"expected an object, found {type(value).__name__}"
    texts = []
    for index, name in enumerate(rule.text):
        field = lookup(value, name)
        if field is None and index == 0:
            return f"no field {name!r}"
        if field is not None and not isinstance(field, str):
            return f"field {name!r}: expected text, found {type(field).__name__}"
        if field:
            texts.append(field)
    text = "\n".join(texts)
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
    """`meta.source` as the key of that name, otherwise as `source` of the mapping `meta`; None where there is neither."""
    if name in value:
        return value[name]
    field: Any = value
    for key in name.split("."):
        field = field.get(key) if isinstance(field, dict) else None
    return field
