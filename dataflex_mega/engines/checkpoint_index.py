"""Tensors on disk through torch.distributed.checkpoint, with an index in JSON in place of its pickle.

    index.json   {"version", "tensors": {name: {dtype, size, chunks: [{offsets, sizes, file, offset, length}]}},
                  "values": {name: {file, offset, length}}}
    __0_0.distcp the tensors of rank 0, each as torch.save writes it and torch.load(weights_only=True) reads it

A folder without index.json has torch's own `.metadata`, which `pickled_index` reads. So nothing in a checkpoint executes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    ReadItem,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

from dataflex_mega.engines.pickled_index import DAMAGE, PICKLED, read_pickled_index
from dataflex_mega.errors import CheckpointError, UserError

INDEX, VERSION = "index.json", 1
# What the plain values of an optimizer may be besides torch's own safe classes: bytes that Transformer Engine stores.
PLAIN_CLASSES: list[Any] = [io.BytesIO]


class IndexWriter(FileSystemWriter):
    """torch's writer with the index in JSON. The files are flushed to the disk by whoever renames the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write the index; called on one rank when all have written."""
        places = {written.index: written.storage_data for of_rank in results for written in of_rank}
        index = {"version": VERSION, **_to_plain(metadata.state_dict_metadata, places)}
        (Path(self.path) / INDEX).write_text(json.dumps(index))


class IndexReader(FileSystemReader):
    """torch's reader for a folder with `index.json`, or with a `.metadata`, which is not unpickled.

    Raises CheckpointError for an index that is missing or damaged, before torch asks for it and looks for another.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._index = read_index(folder)

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        """The index of all ranks."""
        return self._index


class PlainValues(DefaultLoadPlanner):
    """torch's planner, which reads values that are no tensors without their code. Put it before a planner to change."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """A value that is no tensor. Raises UnpicklingError for one that is not plain."""
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            plain = torch.load(value, map_location="cpu", weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], plain)
        else:
            self.state_dict[name] = plain


def load_plain(file: Path) -> Any:
    """What torch.save wrote, when it is tensors and plain values. Raises CheckpointError, also for a file with code."""
    with one_line(file):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def one_line(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Turns what reading a damaged or foreign checkpoint raises, on any rank, into a CheckpointError that names `path`.
    `also`: what a library raises of its own."""
    try:
        yield
    except UserError:
        raise
    except CheckpointException as error:  # a BaseException; holds what each rank raised
        cause = next((failure[0] for failure in error.failures.values()), None)
        if isinstance(cause, UserError):
            raise cause from error
        raise CheckpointError(f"{path}: cannot be read: {_cause(cause or error)}") from error
    except (*DAMAGE, *also) as error:
        raise CheckpointError(f"{path}: cannot be read: {_cause(error)}") from error


def read_index(folder: Path) -> Metadata:
    """The index of a folder. Raises CheckpointError when it is missing, damaged, or names files outside the folder."""
    file = folder / INDEX
    if not file.is_file():
        file = folder / PICKLED
        if not file.is_file():
            raise CheckpointError(f"{folder}: no tensors of a checkpoint; neither {INDEX} nor {PICKLED} is there")
        return _from_plain(file, read_pickled_index(file))
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not an index of a checkpoint: {_cause(error)}") from error
    if version != VERSION:
        raise CheckpointError(f"{file}: format version {version!r}, this program reads {VERSION}")
    return _from_plain(file, index)


def _cause(error: BaseException) -> str:
    """The first line of a library's error that says something. torch.load's advice to execute the file is left out."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = str(error)
    named = re.search(r"GLOBAL:? (\S+)|class (\S+) was not an allowed global", text)
    if named:
        return f"it names {named.group(1) or named.group(2)}, which is not executed"
    lines = [
        line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Weights only load failed")
    ]
    return f"{type(error).__name__}: {lines[0][:240] if lines else ''}".rstrip(": ")


def _to_plain(stored: Mapping[str, Any], places: Mapping[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, item in stored.items():
        if isinstance(item, BytesStorageMetadata):
            values[name] = _place(places[MetadataIndex(name)])
            continue
        chunks = [
            {
                "offsets": list(chunk.offsets),
                "sizes": list(chunk.sizes),
                **_place(places[MetadataIndex(name, chunk.offsets)]),
            }
            for chunk in item.chunks
        ]
        dtype = str(item.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "size": list(item.size), "chunks": chunks}
    return {"tensors": tensors, "values": values}


def _place(place: _StorageInfo) -> dict[str, Any]:
    return {"file": place.relative_path, "offset": place.offset, "length": place.length}


def _from_plain(file: Path, index: Any) -> Metadata:
    """The inverse of `_to_plain`, with every value checked."""
    try:
        stored: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name, value in index["values"].items():
            stored[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _checked_place(value)
        for name, tensor in index["tensors"].items():
            dtype = getattr(torch, str(tensor["dtype"]), None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has no dtype {tensor['dtype']!r:.40}")
            chunks = []
            for chunk in tensor["chunks"]:
                offsets, sizes = _counts(chunk["offsets"]), _counts(chunk["sizes"])
                chunks.append(ChunkStorageMetadata(offsets, sizes))
                places[MetadataIndex(name, offsets)] = _checked_place(chunk)
            properties = TensorProperties(dtype=dtype)
            stored[name] = TensorStorageMetadata(properties, _counts(tensor["size"]), chunks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not an index of a checkpoint: {_cause(error)}") from error
    return Metadata(state_dict_metadata=stored, storage_data=places)


def _counts(values: Any) -> torch.Size:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"{values!r:.60} is no list of counts")
    return torch.Size(values)


def _checked_place(place: Mapping[str, Any]) -> _StorageInfo:
    name = place["file"]
    if not isinstance(name, str) or name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"{name!r:.60} is no file of the folder")
    offset, length = _counts([place["offset"], place["length"]])
    return _StorageInfo(name, offset, length)
