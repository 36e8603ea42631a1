"""Images, videos and audio beside the tokens of a row: as a dataset names them, not yet decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash

END_BYTES = 4096  # of a file, at each end, that its hash reads


@dataclass(frozen=True)
class Media:
    """What belongs to one row, in the order of its placeholders: paths, bytes, or mappings with either."""

    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images or self.videos or self.audios)

    def items(self) -> Iterator[tuple[str, Any]]:
        """(kind, item) of everything."""
        for kind in ("images", "videos", "audios"):
            yield from ((kind, item) for item in getattr(self, kind))


NO_MEDIA = Media()


@runtime_checkable
class MediaSource(Protocol):
    """Rows that may have media; see data.pool.RowSource."""

    def media_kinds(self) -> tuple[str, ...]:
        """Which of images, videos and audios some row has."""
        ...

    def media(self, rows: np.ndarray) -> list[Media]:
        """[n] row numbers -> their media."""
        ...


def media_kinds(source: object) -> tuple[str, ...]:
    """The kinds of media that rows have, () for rows of text alone."""
    return source.media_kinds() if isinstance(source, MediaSource) else ()


def media_of(source: object, rows: np.ndarray) -> list[Media] | None:
    """[n] row numbers -> their media; None when no row of the source has any."""
    return source.media(rows) if isinstance(source, MediaSource) and source.media_kinds() else None


def media_hash(media: Media) -> bytes:
    """What identifies the media of a row, wherever their files lie: of a file its size and both of its ends, so that a pool
    of large files is hashed in seconds."""
    xxh = xxhash.xxh3_128()
    for kind, item in media.items():
        xxh.update(kind.encode())
        _feed(xxh, item)
    return xxh.digest()


def _feed(xxh: Any, item: Any) -> None:
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes):
        xxh.update(len(item).to_bytes(8, "little") + item)
    elif isinstance(item, list | tuple):  # frames of a video
        xxh.update(len(item).to_bytes(8, "little"))
        for part in item:
            _feed(xxh, part)
    elif isinstance(item, str) and Path(item).is_file():
        size = Path(item).stat().st_size
        with Path(item).open("rb") as stream:
            xxh.update(size.to_bytes(8, "little") + stream.read(END_BYTES))
            if size > END_BYTES:
                stream.seek(max(END_BYTES, size - END_BYTES))
                xxh.update(stream.read())
    else:
        xxh.update(str(item).encode())
