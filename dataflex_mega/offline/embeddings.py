"""Embeddings of samples on disk: one .npy file that any program can map, and a manifest with its identity.

    embeddings.npy      [N, D] float32 or float16, in the order of the samples
    manifest.json       the identity; once the build is done also the SHA-256 of every block of rows
    done-0003.jsonl     while building: the blocks that process 3 has written, one line each

A block is written in place and flushed to the disk before its line is. A build that was killed continues with the blocks
that have no line, or whose rows do not have the checksum of their line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.data.npy_files import map_array
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import append_durably, atomic_write, replace_file, temporary_path
from dataflex_mega.offline.gradients import GradientRows
from dataflex_mega.store.manifest import MANIFEST, read_manifest, read_own_manifest

VERSION = 1
ARRAY_FILE = "embeddings.npy"
WHAT = "embeddings"


class Embeddings:
    """A folder of embeddings, unfinished or complete.

    Args:
        folder: its path.
        identity: the data and encoder, plain values by name; a folder with another identity is refused.
        shape: (N, D).
        dtype: "float32" or "float16", on disk.
        block_size: rows per checksum.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        shape: tuple[int, int],
        dtype: str = "float32",
        block_size: int = 1024,
    ) -> None:
        self.folder, self.shape, self.dtype, self.block_size = folder, shape, np.dtype(dtype), block_size
        self.identity = {**identity, "samples": shape[0], "size": shape[1], "dtype": dtype, "block": block_size}
        self.num_blocks = -(-shape[0] // block_size)

    # -- building --------------------------------------------------------------------------------------------------

    def create_or_resume(self) -> None:
        """Create what is missing of folder, manifest and array; one process calls it.

        Raises CheckpointError for a folder with another identity.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._read_manifest() is None:
            self._remove_records()
            self._write_manifest(None)
        if not self.path.is_file():
            temporary = temporary_path(self.path)
            # Sparse: the file has its size at once, blocks fill it.
            np.lib.format.open_memmap(temporary, mode="w+", dtype=self.dtype, shape=self.shape).flush()
            replace_file(temporary, self.path)

    @property
    def path(self) -> Path:
        """Path of the array."""
        return self.folder / ARRAY_FILE

    def is_complete(self) -> bool:
        """Whether this identity was built to the end. Raises CheckpointError for a folder with another identity."""
        manifest = self._read_manifest()
        return manifest is not None and manifest["blocks"] is not None

    def rows_of_block(self, block: int) -> np.ndarray:
        """[n] int64: the rows of a block, which are also numbers of samples."""
        return np.arange(block * self.block_size, min((block + 1) * self.block_size, self.shape[0]))

    def missing_blocks(self) -> list[int]:
        """Blocks that are not recorded as written, or that do not have the checksum of their record."""
        digests, values = self._recorded_checksums(), open_array(self.path)
        blocks = range(self.num_blocks)
        return [block for block in blocks if digests.get(block) != checksum(values[self.rows_of_block(block)])]

    def write_block(self, block: int, values: np.ndarray, process: int = 0) -> None:
        """Write the [n, D] values of `rows_of_block(block)`. Raises ValueError for another shape."""
        rows = self.rows_of_block(block)
        if values.shape != (len(rows), self.shape[1]):
            raise ValueError(f"block {block} is {(len(rows), self.shape[1])}, given {values.shape}")
        stored = np.ascontiguousarray(values, dtype=self.dtype)
        target = open_array(self.path, "r+")
        target[rows[0] : rows[-1] + 1] = stored
        assert isinstance(target, np.memmap)
        target.flush()
        append_durably(self.folder / f"done-{process:04d}.jsonl", json.dumps([block, checksum(stored)]) + "\n")

    def finalize(self) -> None:
        """Enter the checksums into the manifest; one process calls it, after all have written.

        Raises CheckpointError when a block was not written.
        """
        digests = self._recorded_checksums()
        missing = [block for block in range(self.num_blocks) if block not in digests]
        if missing:
            raise CheckpointError(f"{WHAT}: {self.folder}: block {missing[0]} was not written")
        self._write_manifest([digests[block] for block in range(self.num_blocks)])
        self._remove_records()

    def _remove_records(self) -> None:
        for path in self.folder.glob("done-*.jsonl"):
            path.unlink()

    def _recorded_checksums(self) -> dict[int, str]:
        """Block -> checksum, from the records of all processes; a line that a kill has truncated does not count."""
        digests = {}
        for path in sorted(self.folder.glob("done-*.jsonl")):
            for line in path.read_text().splitlines():
                if line.startswith("[") and line.endswith("]"):
                    block, digest = json.loads(line)
                    digests[int(block)] = str(digest)
        return digests

    def _write_manifest(self, digests: list[str] | None) -> None:
        content = {"version": VERSION, "identity": self.identity, "blocks": digests}
        atomic_write(self.folder / MANIFEST, json.dumps(content, indent=1))

    def _read_manifest(self) -> dict[str, Any] | None:
        return read_own_manifest(self.folder, self.identity, WHAT, VERSION)


def checksum(values: np.ndarray) -> str:
    """SHA-256 of the bytes of an array."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def open_array(path: Path, mode: Any = "r") -> np.ndarray:
    """Memory-map a .npy file. Raises CheckpointError when it cannot be read."""
    return map_array(path, mode, WHAT, CheckpointError)


def open_embeddings(folder: Path) -> tuple[Any, dict[str, Any]]:
    """(the [N, D] array, memory-mapped; its identity) of a finished folder, of a gradient store, or of a bare .npy file,
    whose identity is its checksum.

    Raises CheckpointError for a missing or unfinished folder, and when array and manifest differ in shape.
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
    manifest = read_manifest(folder / MANIFEST, WHAT, VERSION)
    if manifest is None:
        raise CheckpointError(f"{WHAT}: {folder} has no {MANIFEST}; `dataflex-cli embed` writes one")
    if "layout" in manifest:
        rows = GradientRows(folder)
        return rows, rows.identity
    if manifest.get("blocks") is None:
        raise CheckpointError(f"{WHAT}: {folder} is not finished; give the same `dataflex-cli embed` command again")
    values, identity = open_array(folder / ARRAY_FILE), manifest["identity"]
    if not isinstance(identity, dict) or values.shape != (identity.get("samples"), identity.get("size")):
        raise CheckpointError(f"{WHAT}: {folder}: {ARRAY_FILE} is {list(values.shape)}, the manifest says otherwise")
    return values, identity
