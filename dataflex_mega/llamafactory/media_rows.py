"""The images, videos and audio of a dataset, checked in all rows before anything is trained.

LLaMA-Factory looks at a file when it tokenizes a row, or not before the row is trained, and says neither file nor row.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.data.media import Media
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.args import FAILURES, LFArgs, first_line
from dataflex_mega.llamafactory.processors import ImagesAlone
from dataflex_mega.llamafactory.raw_rows import RawRows

KINDS = {"images": "image", "videos": "video", "audios": "audio"}
ROWS_PER_READ = 4096
# What Pillow raises for a file that it cannot read, beside OSError.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)


def kinds_of(rows: Any) -> tuple[str, ...]:
    """Which columns of a tokenized dataset have media in any row."""
    return tuple(kind for kind in KINDS if kind in rows.column_names and _has_value(rows, kind))


def _has_value(rows: Any, column: str) -> bool:
    table = rows.select_columns([column]).with_format("arrow")
    for first in range(0, len(rows), ROWS_PER_READ):
        values = table[first : first + ROWS_PER_READ][column]
        if values.null_count < len(values):
            return True
    return False


def read_media(rows: Any, numbers: np.ndarray) -> list[Media]:
    """[n] row numbers of a dataset with some of the columns images, videos, audios -> their media."""
    columns = rows[numbers.tolist()]
    values = {kind: columns[kind].to_pylist() for kind in columns.column_names}
    return [Media(**{kind: tuple(of_kind[n] or ()) for kind, of_kind in values.items()}) for n in range(len(numbers))]


# -- raw rows --------------------------------------------------------------------------------------------------------------


def check_media(raw: RawRows, args: LFArgs, template: Any, processor: Any) -> None:
    """Raises ConfigError for media that the model cannot take, and DataError naming file and row for the first that is
    missing or cannot be read, or whose row has another number of placeholders."""
    for kind in KINDS:
        if getattr(raw.attributes, kind, None):
            _check_kind(raw, kind, args, template, processor)
    if any(getattr(raw.attributes, kind, None) for kind in KINDS):
        problem = first_media_problem(raw, args, decode=False)
        if problem:
            raise DataError(f"dataset {raw.name!r}: {problem}")


def _check_kind(raw: RawRows, kind: str, args: LFArgs, template: Any, processor: Any) -> None:
    first = next((row for row, items in _items(raw, kind, args) if items), None)
    if first is None:
        return
    where, one = f"dataset {raw.name!r}: {raw.where(first)} has {kind}", KINDS[kind]
    if getattr(template.mm_plugin, f"{one}_token") is None:
        raise ConfigError(f"template: {args.data.template} takes no {kind}, and {where}; use the template of the model")
    if kind == "videos" and (getattr(processor, "video_processor", None) is None or isinstance(processor, ImagesAlone)):
        remedy = "; pip install 'dataflex_mega[vision]'" if isinstance(processor, ImagesAlone) else ""
        raise ConfigError(f"{where}: the model's processor has no part for videos that can be loaded{remedy}")
    if kind == "images":
        _check_fit(args, template, processor)
    names_file = isinstance(next(items for row, items in _items(raw, kind, args) if items)[0], str)
    if kind == "videos" and names_file and find_spec("av") is None:
        raise ConfigError(f"{where}: LLaMA-Factory reads them with av, which is not installed; pip install av")
    if kind == "audios" and not _has_torchaudio():
        raise ConfigError(f"{where}: LLaMA-Factory reads them with torchaudio, and none is installed that works")


def _check_fit(args: LFArgs, template: Any, processor: Any) -> None:
    """Raises ConfigError when a template does not know what to do with the processor of the model."""
    from llamafactory.extras.constants import IMAGE_PLACEHOLDER
    from PIL import Image

    messages, images = [{"role": "user", "content": IMAGE_PLACEHOLDER}], [Image.new("RGB", (64, 64), "white")]
    try:
        template.mm_plugin.process_messages(messages, images, [], [], processor)
    except FAILURES as error:
        name = type(processor).__name__
        raise ConfigError(
            f"template: {args.data.template} does not fit the model, whose processor is {name}: {first_line(error)}"
        ) from error


def _has_torchaudio() -> bool:
    import torchaudio

    try:
        return hasattr(torchaudio, "load")
    except ImportError:  # what stands for it; see llamafactory.compat
        return False


def first_media_problem(raw: RawRows, args: LFArgs, decode: bool) -> str | None:
    """Where the first row is whose media are missing or cannot be read, and why; None when there is none.

    `decode`: read images to their end, not their headers alone.
    """
    known: dict[str, str | None] = {}
    for row, media, columns in _rows(raw, args):
        problem = _count_problem(columns, raw.attributes, media, args)
        for kind, items in media.items():
            for item in items:
                key = item if isinstance(item, str) else ""
                if not key or key not in known:
                    known[key] = _item_problem(item, kind, args, decode)
                problem = problem or known[key]
        if problem:
            return f"{raw.where(row)}: {problem}"
    return None


def _rows(raw: RawRows, args: LFArgs) -> Iterator[tuple[int, dict[str, list[Any]], dict[str, Any]]]:
    """(row, its media by kind, its other columns)."""
    media = {getattr(raw.attributes, kind, None) for kind in KINDS}
    texts = raw.rows.select_columns([name for name in raw.rows.column_names if name not in media]).with_format("arrow")
    sources = [_items(raw, kind, args) for kind in KINDS]
    block: list[dict[str, Any]] = []
    for parts in zip(*sources, strict=True):
        row = parts[0][0]
        if row % ROWS_PER_READ == 0:
            block = texts[row : row + ROWS_PER_READ].to_pylist()
        yield row, dict(zip(KINDS, (items for _, items in parts), strict=True)), block[row % ROWS_PER_READ]


def _items(raw: RawRows, kind: str, args: LFArgs) -> Iterator[tuple[int, list[Any]]]:
    """(row, its items of a kind) for all rows that are trained; paths as LLaMA-Factory resolves them."""
    column = getattr(raw.attributes, kind, None)
    count = raw.num_checked()
    table = raw.rows.select_columns([column]).with_format("arrow") if column in raw.rows.column_names else None
    for first in range(0, count, ROWS_PER_READ):
        stop = min(first + ROWS_PER_READ, count)
        values = [None] * (stop - first) if table is None else table[first:stop][column].to_pylist()
        for row, value in enumerate(values, start=first):
            items = [] if value is None else value if isinstance(value, list) else [value]
            yield row, [_resolve(item, raw, args) for item in items]


def _resolve(item: Any, raw: RawRows, args: LFArgs) -> Any:
    if raw.attributes.load_from not in ("script", "file"):
        return item
    if isinstance(item, list):
        return [_resolve(part, raw, args) for part in item]
    path = str(Path(str(args.data.media_dir)) / item) if isinstance(item, str) else item
    return path if isinstance(path, str) and Path(path).is_file() else item


def _item_problem(item: Any, kind: str, args: LFArgs, decode: bool) -> str | None:
    if isinstance(item, list):  # frames of a video
        return next(filter(None, (_item_problem(part, "images", args, decode) for part in item)), None)
    path = (
        item if isinstance(item, str) else item.get("path") if isinstance(item, dict) and not item.get("bytes") else ""
    )
    if path is None or item is None or (path and not Path(path).is_file()):
        return f"{KINDS[kind]} {path or item} not found in media_dir {args.data.media_dir}"
    return _image_problem(path or item, decode) if kind == "images" else None


def _image_problem(item: Any, decode: bool) -> str | None:
    import io

    from PIL import Image

    data = item.get("bytes") if isinstance(item, dict) else item
    if not isinstance(data, str | bytes):
        return f"an image must be a path or bytes, found {type(item).__name__}"
    try:
        with Image.open(data if isinstance(data, str) else io.BytesIO(data)) as image:
            if decode:
                image.load()
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        name = f"image {data}" if isinstance(data, str) else "its image"
        return f"{name} cannot be read: {first_line(error)}"
    return None


def _count_problem(row: dict[str, Any], attributes: Any, media: dict[str, list[Any]], args: LFArgs) -> str | None:
    """Another number of items than placeholders in the text."""
    if args.finetuning.stage == "pt":
        return None
    from llamafactory.extras.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

    text = "\n".join(_texts(row, attributes))
    marks = {"images": IMAGE_PLACEHOLDER, "videos": VIDEO_PLACEHOLDER, "audios": AUDIO_PLACEHOLDER}
    for kind, mark in marks.items():
        found, items = text.count(mark), len(media[kind])
        if found != items:
            return f"{items} {kind} and {found} {mark} in the text; expected one for each"
    return None


def _texts(row: dict[str, Any], attributes: Any) -> Iterator[str]:
    if attributes.formatting == "alpaca":
        for column in (attributes.prompt, attributes.query, attributes.response):
            yield str(row.get(column) or "") if column else ""
        for turn in (row.get(attributes.history) or ()) if attributes.history else ():
            yield from map(str, turn)
        return
    for message in row.get(attributes.messages) or ():
        if isinstance(message, dict) and message.get(attributes.role_tag) != attributes.system_tag:
            yield str(message.get(attributes.content_tag) or "")
