"""The pool: every training sample of every domain under one global id.

Domain d's rows have the ids offset[d] .. offset[d] + size[d] - 1, so an id says its domain and row without a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from dataflex_mega.data.media import NO_MEDIA, Media, media_hash, media_kinds, media_of
from dataflex_mega.errors import DataError

ROWS_PER_READ = 1024  # while all rows of a domain are hashed


class RowSource(Protocol):
    """Random access to tokenized rows."""

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """[n] row numbers -> n pairs (input_ids, labels) of int64 arrays of one length, labels not yet shifted."""
        ...


class ReferenceLosses(Protocol):
    """Random access to token losses of a reference model; see store.reference_losses."""

    def fetch(self, ids: np.ndarray) -> list[np.ndarray]:
        """[n] global ids -> n arrays [length] float32."""
        ...


@dataclass(frozen=True)
class RowSlice:
    """`count` consecutive rows of another source, beginning at its row `first`."""

    rows: RowSource
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def fetch(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return self.rows.fetch(rows + self.first)

    def media_kinds(self) -> tuple[str, ...]:
        return media_kinds(self.rows)

    def media(self, rows: np.ndarray) -> list[Media]:
        return media_of(self.rows, rows + self.first) or [NO_MEDIA] * len(rows)


@dataclass(frozen=True)
class Domain:
    """A named source of samples, one entry of the `dataset` key."""

    name: str
    rows: RowSource


@dataclass(frozen=True)
class Sample:
    """One row of the pool before collation."""

    sample_id: int
    domain_id: int
    input_ids: np.ndarray  # [length] int64
    labels: np.ndarray  # [length] int64, aligned with input_ids
    # [length] float32: at position s the reference model's loss of token s + 1; 0 at the last position. Of a pair, see
    # data.pairs, [2] float32: the sums of the chosen and of the rejected answer.
    reference_losses: np.ndarray | None = None
    media: Media = NO_MEDIA  # images, videos and audio, whose placeholders are among the input_ids


class SamplePool:
    """All domains, addressed by global sample id."""

    def __init__(
        self,
        domains: Sequence[Domain],
        reference_losses: ReferenceLosses | None = None,
        references_per_sample: int | None = None,
    ) -> None:
        """`references_per_sample`: how many losses of a reference model a sample has; None: one for each token.

        Raises DataError when there is no domain or one of them is empty.
        """
        if not domains:
            raise DataError("dataset: at least one is needed")
        for domain in domains:
            if len(domain.rows) == 0:
                raise DataError(f"dataset {domain.name!r}: no usable rows")
        self.domains = list(domains)
        self.names = tuple(domain.name for domain in domains)
        self.sizes = tuple(len(domain.rows) for domain in domains)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.reference_losses, self.references_per_sample = reference_losses, references_per_sample

    def with_references(self, losses: ReferenceLosses, per_sample: int | None = None) -> SamplePool:
        """The same samples with losses of a reference model, of tokens or `per_sample` numbers."""
        return SamplePool(self.domains, losses, per_sample)

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] global ids -> ([n] domain ids, [n] rows in these domains)."""
        domain_ids = np.searchsorted(self.offsets, ids, side="right") - 1
        return domain_ids, ids - self.offsets[domain_ids]

    def fetch(self, ids: np.ndarray) -> list[Sample]:
        """[n] global ids -> the samples in that order."""
        domain_ids, rows = self.locate(ids)
        samples: list[Sample | None] = [None] * len(ids)
        all_losses = [None] * len(ids) if self.reference_losses is None else self.reference_losses.fetch(ids)
        for d in np.unique(domain_ids):
            positions = np.flatnonzero(domain_ids == d)
            fetched = self.domains[d].rows.fetch(rows[positions])
            media = media_of(self.domains[d].rows, rows[positions]) or [NO_MEDIA] * len(positions)
            for position, (input_ids, labels), of_row in zip(positions, fetched, media, strict=True):
                sample_id, losses = int(ids[position]), all_losses[position]
                if losses is not None and len(losses) != (self.references_per_sample or len(input_ids)):
                    raise DataError(
                        f"{self.describe(sample_id)}: {len(input_ids)} tokens but {len(losses)} reference losses; "
                        "build the reference again"
                    )
                samples[position] = Sample(sample_id, int(d), input_ids, labels, losses, of_row)
        return [sample for sample in samples if sample is not None]

    def partition(self, sizes: Sequence[int]) -> list[SamplePool]:
        """Consecutive pools of these sizes, which sum to this pool's; each may hold rows of several domains."""
        ends = np.cumsum(sizes)
        pools = []
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            starts, stops = np.maximum(self.offsets[:-1], first), np.minimum(self.offsets[1:], end)
            inside = zip(self.domains, self.offsets, starts, stops, strict=False)
            ranges = [(d, int(a - o), int(b - a)) for d, o, a, b in inside if b > a]
            pools.append(SamplePool([Domain(d.name, RowSlice(d.rows, first, count)) for d, first, count in ranges]))
        return pools

    def describe(self, sample_id: int) -> str:
        """`c4 row 17`, for messages."""
        domain_ids, rows = self.locate(np.asarray([sample_id]))
        return f"{self.names[int(domain_ids[0])]} row {int(rows[0])}"

    def content_hash(self) -> dict[str, str]:
        """Domain name -> XXH3-128 of all its rows: the identity of files that were computed from these data.

        Reads all tokens once, so it is for runs that go over the whole pool anyway.
        """
        hashes = {}
        for domain in self.domains:
            xxh = xxhash.xxh3_128()
            for first in range(0, len(domain.rows), ROWS_PER_READ):
                rows = np.arange(first, min(first + ROWS_PER_READ, len(domain.rows)))
                for input_ids, labels in domain.rows.fetch(rows):
                    xxh.update(len(input_ids).to_bytes(8, "little"))
                    xxh.update(input_ids.tobytes())
                    xxh.update(labels.tobytes())
                for media in media_of(domain.rows, rows) or ():
                    xxh.update(media_hash(media))
            hashes[domain.name] = xxh.hexdigest()
        return hashes
