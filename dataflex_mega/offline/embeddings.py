"""Embeddings of samples on disk: one .npy file that anything can map, and a manifest that says what it belongs to.

    embeddings.npy      [N, D] float32 or float16, in the order of the samples
    manifest.json       the identity; once the build is done also the SHA-256 of every block of rows
    done-0003.jsonl     while building: blocks that process 3 has written, a line each

A block is written in place and flushed to disk before its line is. A build that was killed goes on with the blocks that have
no line, or whose rows do not have the checksum of their line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.errors import CheckpointError
from dataflex_mega.offline.gradients import GradientRows
from dataflex_mega.store.manifest import MANIFEST, check_identity, read_json, write_beside

VERSION = 1
FILE = "embeddings.npy"
WHAT = "embeddings"


class Embeddings:
    """A folder of embeddings: being built, or complete and read.

    Args:
        folder: where it is or will be.
        identity: what they belong to, plain values by name; a folder with another identity is refused.
        shape: (N, D).
        dtype: "float32" or "float16", on disk.
        block: rows between checksums.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        shape: tuple[int, int],
        dtype: str = "float32",
        block: int = 1024,
    ) -> None:
        self.folder, self.shape, self.dtype, self.block = folder, shape, np.dtype(dtype), block
        self.identity = {**identity, "samples": shape[0], "size": shape[1], "dtype": dtype, "block": block}
        self.blocks = -(-shape[0] // block)

    # -- building --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make folder and file where they are not there; one process calls it. Raises CheckpointError for another's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.manifest() is None:
            for old in self.folder.glob("done-*.jsonl"):
                old.unlink()
            self._write_manifest(None)
        if not self.path.is_file():
            beside = self.path.with_suffix(".tmp")
            # Sparse: the file has its size at once, blocks fill it.
            np.lib.format.open_memmap(beside, mode="w+", dtype=self.dtype, shape=self.shape).flush()
            beside.replace(self.path)

    @property
    def path(self) -> Path:
        """Of the array."""
        return self.folder / FILE

    def complete(self) -> bool:
        """Whether a build of this identity was finished here. Raises CheckpointError for a folder of another."""
        found = self.manifest()
        return found is not None and found["blocks"] is not None

    def rows(self, block: int) -> np.ndarray:
        """[n] int64: the samples of a block."""
        return np.arange(block * self.block, min((block + 1) * self.block, self.shape[0]))

    def missing(self) -> list[int]:
        """Blocks that are not recorded as written, or that do not have the checksum of their record."""
        sums, values = self._recorded(), open_array(self.path)
        return [b for b in range(self.blocks) if sums.get(b) != checksum(values[self.rows(b)])]

    def write(self, block: int, values: np.ndarray, process: int = 0) -> None:
        """[n, D] of `rows(block)`. Raises ValueError for another shape."""
        rows = self.rows(block)
        if values.shape != (len(rows), self.shape[1]):
            raise ValueError(f"block {block} is {(len(rows), self.shape[1])}, given {values.shape}")
        stored = np.ascontiguousarray(values, dtype=self.dtype)
        target = open_array(self.path, "r+")
        target[rows[0] : rows[-1] + 1] = stored
        assert isinstance(target, np.memmap)
        target.flush()
        with (self.folder / f"done-{process:04d}.jsonl").open("a") as stream:
            stream.write(json.dumps([block, checksum(stored)]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Enter the checksums into the manifest; one process calls it, after all have written."""
        sums = self._recorded()
        absent = [block for block in range(self.blocks) if block not in sums]
        if absent:
            raise CheckpointError(f"{WHAT}: {self.folder}: block {absent[0]} was not written")
        self._write_manifest([sums[block] for block in range(self.blocks)])
        for old in self.folder.glob("done-*.jsonl"):
            old.unlink()

    def _recorded(self) -> dict[int, str]:
        """Block -> checksum, from the records of all processes; a line that a kill has cut is no record."""
        found = {}
        for path in sorted(self.folder.glob("done-*.jsonl")):
            for line in path.read_text().splitlines():
                if line.startswith("[") and line.endswith("]"):
                    block, total = json.loads(line)
                    found[int(block)] = str(total)
        return found

    def _write_manifest(self, blocks: list[str] | None) -> None:
        content = {"version": VERSION, "identity": self.identity, "blocks": blocks}
        write_beside(self.folder / MANIFEST, json.dumps(content, indent=1).encode())

    def manifest(self) -> dict[str, Any] | None:
        """The manifest when there is one. Raises CheckpointError when it belongs to something else."""
        found = read_json(self.folder / MANIFEST, WHAT, VERSION)
        if found is None:
            return None
        check_identity(self.folder, found["identity"], self.identity, WHAT)
        return found


def checksum(values: np.ndarray) -> str:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def open_array(path: Path, mode: Any = "r") -> np.ndarray:
    """A .npy file, mapped. Raises CheckpointError when it cannot be."""
    try:
        return np.load(path, mmap_mode=mode)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{WHAT}: {path} cannot be read: {error}") from error


def open_embeddings(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the [N, D] array, mapped; its identity) of a finished folder, of a gradient store, or of a bare .npy file, whose
    identity is its checksum.

    Raises CheckpointError when there is none, its build was not finished, or array and manifest differ in shape.
    """
    if folder.suffix == ".npy" and folder.is_file():
        values = open_array(folder)
        if values.ndim != 2 or values.dtype.kind != "f":
            raise CheckpointError(
                f"{WHAT}: {folder}: expected [N, D] numbers, found {list(values.shape)} {values.dtype}"
            )
        with folder.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return values, {"file": digest[:16], "samples": len(values), "size": values.shape[1]}
    found = read_json(folder / MANIFEST, WHAT, VERSION)
    if found is None:
        raise CheckpointError(f"{WHAT}: {folder} has no {MANIFEST}; `dataflex-cli embed` writes one")
    if "layout" in found:
        rows = GradientRows(folder)
        return rows, rows.identity
    if found["blocks"] is None:
        raise CheckpointError(f"{WHAT}: {folder} is not finished; give the same `dataflex-cli embed` command again")
    values, identity = open_array(folder / FILE), found["identity"]
    if values.shape != (identity["samples"], identity["size"]):
        raise CheckpointError(f"{WHAT}: {folder}: {FILE} is {list(values.shape)}, the manifest says otherwise")
    return values, identity
