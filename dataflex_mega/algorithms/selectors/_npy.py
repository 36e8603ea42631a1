"""Reads arrays that DataFlex's offline tools wrote. Algorithms import torch alone, so this is not NumPy's reader."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dataflex_mega.errors import DataError

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000  # bytes, as numpy's own reader has it


def read_npy(path: Path, dtypes: Mapping[str, torch.dtype], axes: tuple[str, ...], content: str) -> Tensor:
    """The array of a .npy file (numpy's format 1 to 3).

    Args:
        dtypes: numpy's names of the types that the file may have, and torch's.
        axes: names of the axes that it must have, for messages too.
        content: what it must hold, for messages.

    Raises:
        DataError: another format, type or number of axes, an empty array, or a file that was cut off.
    """
    with path.open("rb") as stream:
        if stream.read(len(NPY_MAGIC)) != NPY_MAGIC:
            raise DataError(f"{path}: expected a .npy file of {content}, found another format")
        length_bytes = 2 if stream.read(2)[:1] == b"\x01" else 4
        length = int.from_bytes(stream.read(length_bytes), "little")
        text = stream.read(min(length, MAX_HEADER))
        data = bytearray(stream.read())
    kind, shape, columns_first = _header(path, text)
    if length > MAX_HEADER:
        raise DataError(f"{path}: the header of the .npy file has {length} bytes, at most {MAX_HEADER} are read")
    if kind not in dtypes or len(shape) != len(axes):
        expected = f"[{', '.join(axes)}] numbers of type {' or '.join(dtypes)}"
        raise DataError(f"{path}: expected {expected}, found {list(shape)} of {kind}")
    size = math.prod(shape) * dtypes[kind].itemsize
    if len(data) != size or size == 0:
        raise DataError(f"{path}: expected {size} bytes for the shape {list(shape)}, at least one, found {len(data)}")
    flat = torch.frombuffer(data, dtype=dtypes[kind])
    return flat.view(shape[::-1]).t() if columns_first and len(axes) == 2 else flat.view(shape)


def _header(path: Path, text: bytes) -> tuple[str, tuple[int, ...], bool]:
    """(type, shape, whether columns are contiguous) of a header, a literal that is read without executing it."""
    try:
        header = ast.literal_eval(text.decode("utf-8"))
        kind, shape, columns_first = header["descr"], header["shape"], header["fortran_order"]
    except (SyntaxError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: the header of the .npy file cannot be read") from error
    whole = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
    if not whole or not isinstance(columns_first, bool):
        raise DataError(f"{path}: the header of the .npy file has shape {shape!r:.80}")
    return str(kind), shape, columns_first
