"""Read the index that torch.distributed.checkpoint pickles as `.metadata`, without executing what it names.

A pickle may name any function to call. Here the names of a fixed list become inert records, made for one reading each;
every other name ends the reading. What the records say is then read field by field, as values from JSON would be.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dataflex_mega.errors import CheckpointError

PICKLED = ".metadata"
MAX_BYTES = 1 << 31  # an index is far below; a larger one is not read into memory

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
# (module, name) of every class that torch.distributed.checkpoint and megatron-core put into an index.
RECORDS = frozenset(
    {
        *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata")),
        *((_METADATA, name) for name in ("BytesStorageMetadata", "MetadataIndex", "TensorProperties", "StorageMeta")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        ("torch.serialization", "_get_layout"),  # called with the name of a layout, which is not needed here
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)
# What the bytes of a damaged or foreign file can raise while they are read and used.
DAMAGE = (
    pickle.UnpicklingError, struct.error, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError,
    ArithmeticError, MemoryError, RuntimeError, ImportError, AssertionError,
)  # fmt: skip


class Record:
    """What a pickle says about an object: the arguments it was made with and its state. Nothing else happens."""

    kind = ""
    state: Any

    def __new__(cls, *args: Any, **_options: Any) -> Record:
        record = object.__new__(cls)
        record.__dict__.update(args=args, state={})
        return record

    def __init__(self, *args: Any, **options: Any) -> None:
        """All of it is done by `__new__`, which pickle may call alone."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state

    def field(self, name: str) -> Any:
        """A field of a dataclass. Raises ValueError when there is none."""
        state = self.state
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{self.kind} has no {name}")
        return state[name]


class _Unpickler(pickle.Unpickler):
    """Knows the classes of RECORDS, torch's dtypes and sizes; refuses all else."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self._made: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECORDS:
            # one class for a name, but another one for every reading, which a pickle might change
            made = self._made.setdefault((module, name), type(name, (Record,), {"kind": name}))
            return made
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index and is not executed")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it names an object outside, {pid!r:.40}")


def read_pickled_index(file: Path) -> dict[str, Any]:
    """The pickled index of tensors and values, in the plain form of checkpoint_index.

    Raises:
        CheckpointError: it cannot be read, is something else, or names what is no part of an index.
    """
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size > MAX_BYTES:
                raise ValueError(f"{size} bytes are too many for an index")
            root = _Unpickler(stream).load()
        return _plain(root)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except DAMAGE as error:
        raise CheckpointError(f"{file}: not an index of a checkpoint: {_first_line(error)}") from error


def _plain(root: Any) -> dict[str, Any]:
    if not isinstance(root, Record) or root.kind != "Metadata":
        raise ValueError(f"it holds a {getattr(root, 'kind', type(root).__name__)}")
    places: dict[str, dict[tuple[int, ...] | None, Record]] = {}
    for index, place in root.field("storage_data").items():
        offset = index.field("offset") if "offset" in index.state else None
        places.setdefault(index.field("fqn"), {})[offset] = place
    tensors: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for name, stored in root.field("state_dict_metadata").items():
        if stored.kind == "BytesStorageMetadata":
            values[name] = _place(places[name][None])
            continue
        chunks = [
            {
                "offsets": list(chunk.field("offsets")),
                "sizes": list(chunk.field("sizes")),
                **_place(places[name][tuple(chunk.field("offsets"))]),
            }
            for chunk in stored.field("chunks")
        ]
        properties = stored.field("properties").state
        dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
        tensors[name] = {
            "dtype": str(dtype).removeprefix("torch."),
            "size": list(stored.field("size")),
            "chunks": chunks,
        }
    return {"tensors": tensors, "values": values}


def _place(place: Record) -> dict[str, Any]:
    """Where the bytes of a piece are."""
    if isinstance(place.state, dict) and place.state.get("transform_descriptors"):
        raise ValueError("its tensors are compressed, which this program does not read")
    return {"file": place.field("relative_path"), "offset": place.field("offset"), "length": place.field("length")}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
