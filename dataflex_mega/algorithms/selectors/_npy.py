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
        text = stream.read(int.from_bytes(stream.read(length_bytes), "little"))
        data = bytearray(stream.read())
    try:
        header = ast.literal_eval(text.decode("utf-8"))
        kind, shape, columns_first = header["descr"], header["shape"], header["fortran_order"]
    except (SyntaxError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the header of the .npy file cannot be read") from error
    if kind not in dtypes or len(shape) != len(axes):
        expected = f"[{', '.join(axes)}] numbers of type {' or '.join(dtypes)}"
        raise DataError(f"{path}: expected {expected}, found {list(shape)} of {kind}")
    size = math.prod(shape) * dtypes[kind].itemsize
    if len(data) != size or size == 0:
        raise DataError(f"{path}: expected {size} bytes for the shape {list(shape)}, at least one, found {len(data)}")
    flat = torch.frombuffer(data, dtype=dtypes[kind])
    return flat.view(shape[::-1]).t() if columns_first and len(axes) == 2 else flat.view(shape)
