"""The pool: every training sample of every domain under one global id.

Domain d's rows have the ids offset[d] .. offset[d] + size[d] - 1, so an id says its domain and row without a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from dataflex_mega.errors import DataError

ROWS = 1024  # rows in memory at once while all of them are read


class Rows(Protocol):
    """Random access to tokenized rows."""

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n pairs (input_ids, labels) of int64 arrays of one length, labels not yet shifted."""
        ...


class References(Protocol):
    """Random access to token losses of a reference model; see store.reference."""

    def fetch(self, ids: np.ndarray) -> list[np.ndarray]:
        """[n] global ids -> n arrays [length] float32."""
        ...


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of others."""

    rows: Rows
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """See Rows."""
        return self.rows.fetch(rows + self.first)


@dataclass(frozen=True)
class Domain:
    """One source of samples."""

    name: str
    rows: Rows


@dataclass(frozen=True)
class Sample:
    """One row on its way into a batch."""

    sample_id: int
    domain: int
    input_ids: np.ndarray  # [length] int64
    labels: np.ndarray  # [length] int64, aligned with input_ids
    reference: np.ndarray | None = (
        None  # [length] float32: at s, the reference model's loss of token s + 1; 0 at the end
    )


class Pool:
    """All domains, addressed by global sample id."""

    def __init__(self, domains: Sequence[Domain]) -> None:
        """Raises DataError when there is no domain or one of them is empty."""
        if not domains:
            raise DataError("dataset: at least one is needed")
        for domain in domains:
            if len(domain.rows) == 0:
                raise DataError(f"dataset {domain.name!r}: no usable rows")
        self.domains = list(domains)
        self.names = tuple(domain.name for domain in domains)
        self.sizes = tuple(len(domain.rows) for domain in domains)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.references: References | None = None  # set once, before training

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] global ids -> ([n] domain, [n] row)."""
        domain = np.searchsorted(self.offsets, ids, side="right") - 1
        return domain, ids - self.offsets[domain]

    def fetch(self, ids: np.ndarray) -> list[Sample]:
        """[n] global ids -> the samples in that order."""
        domain, row = self.locate(ids)
        samples: list[Sample | None] = [None] * len(ids)
        references = [None] * len(ids) if self.references is None else self.references.fetch(ids)
        for d in np.unique(domain):
            places = np.flatnonzero(domain == d)
            for place, (inputs, labels) in zip(places, self.domains[d].rows.fetch(row[places]), strict=True):
                reference = references[place]
                if reference is not None and len(reference) != len(inputs):
                    where, there = self.describe(int(ids[place])), f"{len(reference)} reference losses"
                    raise DataError(f"{where}: {len(inputs)} tokens but {there}; build the reference again")
                samples[place] = Sample(int(ids[place]), int(d), inputs, labels, reference)
        return [sample for sample in samples if sample is not None]

    def cut(self, sizes: Sequence[int]) -> list[Pool]:
        """Consecutive parts of these sizes, which sum to the pool's; a part may hold rows of several domains."""
        ends = np.cumsum(sizes)
        parts = []
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            starts, stops = np.maximum(self.offsets[:-1], first), np.minimum(self.offsets[1:], end)
            inside = zip(self.domains, self.offsets, starts, stops, strict=False)
            ranges = [(d, int(a - o), int(b - a)) for d, o, a, b in inside if b > a]
            parts.append(Pool([Domain(d.name, RowRange(d.rows, first, count)) for d, first, count in ranges]))
        return parts

    def describe(self, sample_id: int) -> str:
        """`c4 row 17`, for messages."""
        domain, row = self.locate(np.asarray([sample_id]))
        return f"{self.names[int(domain[0])]} row {int(row[0])}"

    def fingerprint(self, probes: int = 64) -> dict[str, str]:
        """Domain name -> a hash of its size and of `probes` rows spread over it. A checkpoint remembers it."""
        found = {}
        for domain in self.domains:
            size = len(domain.rows)
            sha = hashlib.sha256(str(size).encode())
            rows = np.unique(np.linspace(0, size - 1, num=min(probes, size)).astype(np.int64))
            for inputs, labels in domain.rows.fetch(rows):
                sha.update(inputs.tobytes())
                sha.update(labels.tobytes())
            found[domain.name] = sha.hexdigest()[:16]
        return found

    def content(self) -> dict[str, str]:
        """Domain name -> a hash (XXH3-128) of every row in it: what files that are kept for these data belong to.

        Reads all tokens once, so it is for runs that go over the whole pool anyway.
        """
        found = {}
        for domain in self.domains:
            seen = xxhash.xxh3_128()
            for first in range(0, len(domain.rows), ROWS):
                for inputs, labels in domain.rows.fetch(np.arange(first, min(first + ROWS, len(domain.rows)))):
                    seen.update(len(inputs).to_bytes(8, "little"))
                    seen.update(inputs.tobytes())
                    seen.update(labels.tobytes())
            found[domain.name] = seen.hexdigest()
        return found
