"""What two runs have written, compared bit by bit. Each function gives the first difference, or None.

Text files are compared by value with their types, so 1 is not 1.0; numbers by the digits that Python writes for them, which
tell any two floats apart, and NaN equals NaN. Tensors are compared by name, type, shape and bytes.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fields that hold wall-clock time, in any file, and one that names modules of this package.
IGNORED_FIELDS = (
    "timestamp", "*seconds*", "overhead", "*_time", "*_runtime", "*per_second*", "throughput", "callbacks",
)  # fmt: skip
# Files without numbers of a run, with pictures of numbers that are elsewhere, or of another layout on each side.
LEFT_OUT = {
    "*.png": "pictures",
    "*.md": "reports in prose, from results.json",
    "results.csv": "from results.json",
    "log": "messages",
    "*.log": "messages",
    "*.yaml": "configurations that the run was given",
    "*.stamp": "fingerprints of the tools that made the inputs",
    "*.sh": "command lines",
    "*.lock": "locks",
    "times.jsonl": "seconds per step",
    "training_args.bin": "a pickled object, from the configuration",
    "run.json": "the name of a run and whether it has finished",
    "checkpoint-*": "checkpoints; their keys are internal, the runs `resumed` continue from one",
}
MAX_SHOWN = 60  # characters of a value in a message
FLOATS = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "U8": "<B"}


@dataclass(frozen=True)
class Outcome:
    """Of one folder. `difference` is None when all files are equal; `left_out` counts files by pattern."""

    difference: str | None
    compared: int
    left_out: dict[str, int]


def is_ignored(key: str) -> bool:
    """Whether a field of this name is not compared."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in IGNORED_FIELDS)


def show(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value, default=str) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def against(place: str, first: Any, second: Any) -> str:
    """The message for two values in one place."""
    return f"{place}: {show(first)} | {show(second)}"


def value_difference(first: Any, second: Any, place: str = "") -> str | None:
    """Of two values read from JSON. Keys are compared in their order too."""
    if type(first) is not type(second):
        return against(place or "value", first, second)
    if isinstance(first, dict):
        mine, other = ([key for key in value if not is_ignored(str(key))] for value in (first, second))
        if mine != other:
            return against(f"{place} keys".strip(), mine, other)
        parts = [(f"{place}.{key}".lstrip("."), first[key], second[key]) for key in mine]
    elif isinstance(first, list):
        if len(first) != len(second):
            return against(f"{place} length".strip(), len(first), len(second))
        parts = [(f"{place}[{index}]", a, b) for index, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        same = repr(first) == repr(second)
        return None if same else against(place or "value", first, second)
    found = (value_difference(a, b, inner) for inner, a, b in parts)
    return next((difference for difference in found if difference), None)


# -- one kind of file each: (bytes, bytes) -> first difference ---------------------------------------------------------


def json_difference(first: bytes, second: bytes) -> str | None:
    """Of two JSON documents."""
    return value_difference(json.loads(first), json.loads(second))


def lines_difference(first: bytes, second: bytes, read: Callable[[str], Any] = str) -> str | None:
    """Of two files with one value per line."""
    mine, other = first.decode().splitlines(), second.decode().splitlines()
    for number, (a, b) in enumerate(zip(mine, other, strict=False), 1):
        difference = value_difference(read(a), read(b))
        if difference:
            return f"line {number}, {difference}"
    return None if len(mine) == len(other) else against("number of lines", len(mine), len(other))


def json_lines_difference(first: bytes, second: bytes) -> str | None:
    """Of two files with a JSON document a line."""
    return lines_difference(first, second, json.loads)


def csv_difference(first: bytes, second: bytes) -> str | None:
    """Of two tables."""
    mine, other = (list(csv.reader(io.StringIO(content.decode()))) for content in (first, second))
    return value_difference(mine, other)


def bytes_difference(first: bytes, second: bytes) -> str | None:
    """Of anything else."""
    if first == second:
        return None
    if len(first) != len(second):
        return against("bytes in all", len(first), len(second))
    at = next(index for index, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return against(f"byte {at}", first[at], second[at])


def read_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file -> (name -> type, shape and offsets; data)."""
    (size,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def tensors_difference(first: bytes, second: bytes) -> str | None:
    """Of two safetensors files: names and metadata, then each tensor."""
    if first == second:
        return None
    (mine, data), (other, other_data) = read_tensors(first), read_tensors(second)
    if sorted(mine) != sorted(other):
        missing = sorted(set(mine) ^ set(other))
        return f"tensors of one side only: {', '.join(missing)[:200]}"
    for name in sorted(mine):
        described = ({k: v for k, v in part[name].items() if k != "data_offsets"} for part in (mine, other))
        difference = value_difference(*described, name)
        if difference:
            return difference
        if name != "__metadata__":
            a, b = (d[slice(*part[name]["data_offsets"])] for part, d in ((mine, data), (other, other_data)))
            if a != b:
                return f"{name}{element_difference(a, b, mine[name]['dtype'])}"
    return None


def element_difference(first: bytes, second: bytes, dtype: str) -> str:
    """Of two tensors of one type: the first element that differs, in hexadecimal where Python has no such number."""
    code = FLOATS.get(dtype)
    width = struct.calcsize(code) if code else 2
    for at in range(0, len(first), width):
        a, b = first[at : at + width], second[at : at + width]
        if a != b:
            shown = (struct.unpack(code, part)[0] if code else part.hex() for part in (a, b))
            return against(f"[{at // width}]", *shown)
    return ""


def array_difference(first: bytes, second: bytes) -> str | None:
    """Of two .npy files."""
    if first == second:
        return None
    import numpy as np

    a, b = (np.load(io.BytesIO(content), allow_pickle=False) for content in (first, second))
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return against("type and shape", (str(a.dtype), a.shape), (str(b.dtype), b.shape))
    return value_difference(a.tolist(), b.tolist()) or bytes_difference(first, second)


def events(content: bytes) -> list[tuple[Any, ...]]:
    """Scalars of a TensorBoard file: (step, tag, value), without those that are ignored."""
    from tensorboard.compat.proto.event_pb2 import Event

    found, at = [], 0
    while at < len(content):  # a record: length, its checksum, data, their checksum
        (size,) = struct.unpack_from("<Q", content, at)
        event = Event.FromString(content[at + 12 : at + 12 + size])
        at += 12 + size + 4
        for value in event.summary.value:
            if not is_ignored(value.tag):
                number = value.simple_value if value.HasField("simple_value") else value.tensor.SerializeToString()
                found.append((event.step, value.tag, number))
    return found


def events_difference(first: bytes, second: bytes) -> str | None:
    """Of two TensorBoard files."""
    mine, other = (
        [{"step": step, "tag": tag, "value": value} for step, tag, value in events(content)]
        for content in (first, second)
    )
    return value_difference(mine, other)


KINDS: dict[str, Callable[[bytes, bytes], str | None]] = {
    "*.json": json_difference,
    "*.jsonl": json_lines_difference,
    "*.txt": lines_difference,
    "*.csv": csv_difference,
    "*.safetensors": tensors_difference,
    "*.npy": array_difference,
    "*tfevents*": events_difference,
}


# -- folders -----------------------------------------------------------------------------------------------------------


def left_out(path: Path) -> str | None:
    """The pattern of LEFT_OUT that a file, or a folder around it, matches."""
    for part in path.parts:
        for pattern in LEFT_OUT:
            if fnmatch.fnmatchcase(part, pattern):
                return pattern
    return None


def listed(folder: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """(name -> file, of those that are compared; pattern -> number of files left out).

    TensorBoard's names hold time and process: they get numbers instead.
    """
    files: dict[str, Path] = {}
    out: dict[str, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder)
        pattern = left_out(relative)
        if pattern:
            out[pattern] = out.get(pattern, 0) + 1
            continue
        name = str(relative)
        if "tfevents" in relative.name:
            place = relative.parent
            if len(place.parts) > 1 and place.parent.name == "runs":  # LLaMA-Factory's runs/DATE_HOST
                place = place.parent
            number = sum(other.startswith(f"{place}/events.tfevents.") for other in files)
            name = f"{place}/events.tfevents.{number}"
        files[name] = path
    return files, out


def file_difference(name: str, first: Path, second: Path) -> str | None:
    """Of two files of one name."""
    compare = next((kind for pattern, kind in KINDS.items() if fnmatch.fnmatchcase(name, pattern)), bytes_difference)
    try:
        difference = compare(first.read_bytes(), second.read_bytes())
    except ValueError as error:  # not what its name says
        difference = bytes_difference(first.read_bytes(), second.read_bytes())
        return difference and f"{name}: {difference} (not readable: {error})"
    return difference and f"{name}: {difference}"


def importance(name: str) -> tuple[bool, str]:
    """Logs of steps come first: they say when two runs began to differ."""
    return not name.endswith((".jsonl", ".txt")), name


def compare_folders(first: Path, second: Path) -> Outcome:
    """All files of two folders."""
    (mine, skipped), (other, _) = listed(first), listed(second)
    names = sorted(mine.keys() & other.keys(), key=importance)
    found = (file_difference(name, mine[name], other[name]) for name in names)
    difference = next((one for one in found if one), None)
    if difference is None:
        for name in sorted(mine.keys() ^ other.keys()):
            difference = f"{name}: only in {'the first' if name in mine else 'the second'}"
            break
    return Outcome(difference, len(names), skipped)
