"""Batches with images, videos and audio: what LLaMA-Factory's template and the model's processor make of them.

A batch without any gets a small white image behind its shortest row, where no token sees it. So every rank runs the same
layers in every step: a sharded layer waits for all ranks, and DistributedDataParallel for all gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.data.collate import collate
from dataflex_mega.data.media import Media
from dataflex_mega.data.pool import Sample
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.args import FAILURES, LFArgs, first_line
from dataflex_mega.types import IGNORE_INDEX, Batch

DUMMY_IMAGE = (64, 64)  # pixels
DUMMY_AUDIO = 1600  # samples
ROWS_PER_READ = 4096
TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")  # one number for each position
UNSUPPORTED = {
    "MiniCPMVPlugin": "its model takes a batch in a form of its own",
    "MiniCPMV4_6Plugin": "its model takes a batch in a form of its own",
    "Qwen2OmniPlugin": "its positions depend on the length of audio, which this loop does not know",
}


@dataclass(frozen=True)
class MediaCollator:
    """Samples -> one micro-batch with the model's further inputs in `Batch.extra`. Called by the loader's threads."""

    template: Any
    processor: Any
    tokenizer: Any
    config: Any  # of the model
    pad_id: int
    has_three_positions: bool  # whether positions are those of a picture's grid (M-RoPE)
    image_tail: list[int] = field(init=False)  # the tokens of the dummy image
    audio_tail: list[int] = field(init=False)

    @classmethod
    def build(cls, args: LFArgs, module: dict[str, Any], template: Any, config: Any, pad_id: int) -> MediaCollator:
        """Raises ConfigError for a model whose inputs are of a form that batches here do not have."""
        from llamafactory.extras.constants import MROPE_MODELS

        name = type(template.mm_plugin).__name__
        if name in UNSUPPORTED:
            raise ConfigError(f"template: {args.data.template} has no roles with images yet: {UNSUPPORTED[name]}")
        three = str(config.model_type) in MROPE_MODELS
        return cls(template, module["processor"], module["tokenizer"], config, pad_id, three)

    def __post_init__(self) -> None:
        from llamafactory.extras.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER

        plugin = self.template.mm_plugin
        image = [] if plugin.image_token is None else self.placeholders(IMAGE_PLACEHOLDER, Media(images=(_white(),)))
        audio = [] if plugin.audio_token is None else self.placeholders(AUDIO_PLACEHOLDER, Media(audios=(_silence(),)))
        object.__setattr__(self, "image_tail", image)
        object.__setattr__(self, "audio_tail", audio)

    @property
    def token_ids(self) -> list[int]:
        """Of the tokens that stand for parts of images, videos and audio."""
        plugin = self.template.mm_plugin
        tokens = (plugin.image_token, plugin.video_token, plugin.audio_token)
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None]

    def placeholders(self, text: str, media: Media) -> list[int]:
        """The tokens of a text with placeholders, expanded to what the model has for them."""
        plugin, images, videos, audios = self.template.mm_plugin, *map(list, (media.images, media.videos, media.audios))
        messages = [{"role": "user", "content": text}]
        messages = plugin.process_messages(messages, images, videos, audios, self.processor)
        ids = self.tokenizer.encode(messages[0]["content"], add_special_tokens=False)
        return plugin.process_token_ids(ids, None, images, videos, audios, self.tokenizer, self.processor)[0]

    def __call__(self, samples: Sequence[Sample], pack_length: int | None = None) -> Batch:
        """n samples -> a micro-batch of n rows. Raises DataError for a file that cannot be read."""
        if pack_length is not None:
            raise ValueError("rows with images are not packed")
        media = [sample.media for sample in samples]
        row = min(range(len(samples)), key=lambda n: len(samples[n].input_ids))
        length, rows = len(samples[row].input_ids), list(samples)
        tail: list[int] = []
        if self.image_tail and not any(of_row.images or of_row.videos for of_row in media):
            media[row] = replace(media[row], images=(_white(),))
            tail += self.image_tail
        if self.audio_tail and not any(of_row.audios for of_row in media):
            media[row] = replace(media[row], audios=(_silence(),))
            tail += self.audio_tail
        if tail:
            rows[row] = _with_tail(rows[row], tail)
        batch = collate(rows, self.pad_id)
        batch.segment_ids[row, length : length + len(tail)] = -1
        batch.position_ids[row, length : length + len(tail)] = 0
        is_media = torch.isin(batch.input_ids, torch.tensor(self.token_ids)) & (batch.segment_ids >= 0)
        return replace(batch, extra=self._inputs(batch, rows, media), is_media=is_media)

    def _inputs(self, batch: Batch, rows: Sequence[Sample], media: Sequence[Media]) -> dict[str, Tensor]:
        opened = _Opened()
        images = [opened.image(item) for of_row in media for item in of_row.images]
        videos, audios = ([item for of_row in media for item in getattr(of_row, k)] for k in ("videos", "audios"))
        lengths = ([len(getattr(of_row, kind)) for of_row in media] for kind in ("images", "videos", "audios"))
        ids = [row.input_ids.tolist() for row in rows]
        try:
            found = self.template.mm_plugin.get_mm_inputs(images, videos, audios, *lengths, ids, self.processor)
        except (*FAILURES, SyntaxError) as error:
            names = ", ".join(str(item) for of_row in media for _, item in of_row.items() if isinstance(item, str))
            raise DataError(
                f"images, videos or audio of a batch cannot be used: {first_line(error)} ({names})"
            ) from error
        inputs = {name: self._tensor(name, value, batch) for name, value in found.items() if value is not None}
        if self.has_three_positions:
            inputs["mm_token_type_ids"] = self._token_types(batch)
        if (
            "token_type_ids" in inputs
        ):  # the model then lets tokens of an image see later ones, so padding must be masked
            inputs["attention_mask"] = (batch.segment_ids >= 0).long()
        return inputs

    def _tensor(self, name: str, value: Any, batch: Batch) -> Tensor:
        """Raises ConfigError for what is no tensor. What has a number for each position is padded to the batch's width."""
        width = batch.input_ids.shape[1]
        if name in TYPES_OF_TOKENS:
            padded = torch.zeros_like(batch.input_ids)
            for row, types in enumerate(value):
                padded[row, : len(types)] = torch.as_tensor(np.asarray(types))
            return padded
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"template: the processor gives {name} as {type(value).__name__}, not a tensor"
            ) from error
        if name == "cross_attention_mask":
            missing = width - tensor.shape[1]
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing))
        return tensor

    def _token_types(self, batch: Batch) -> Tensor:
        """[b, S] 1 at images and 2 at videos, from which the model computes positions."""
        types = torch.zeros_like(batch.input_ids)
        for number, key in ((1, "image_token_id"), (2, "video_token_id")):
            token = getattr(self.config, key, None)
            if token is not None:
                types[batch.input_ids == token] = number
        return types


class _Opened:
    """Images of a batch, each file read once however many rows show it."""

    def __init__(self) -> None:
        self.by_path: dict[str, Any] = {}

    def image(self, item: Any) -> Any:
        if not isinstance(item, str):
            return item
        if item not in self.by_path:
            self.by_path[item] = _read_image(item)
        return self.by_path[item]


def _read_image(path: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except (*FAILURES, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        missing = "" if Path(path).is_file() else " any more"
        raise DataError(f"image {path} cannot be read{missing}: {first_line(error)}") from error
    return image


def _white() -> Any:
    from PIL import Image

    return Image.new("RGB", DUMMY_IMAGE, (255, 255, 255))


def _silence() -> np.ndarray:
    return np.zeros(DUMMY_AUDIO)


def _with_tail(sample: Sample, ids: list[int]) -> Sample:
    """A sample with further tokens that have no loss."""
    tail = np.asarray(ids, dtype=np.int64)
    losses = sample.reference_losses
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids, tail]),
        labels=np.concatenate([sample.labels, np.full_like(tail, IGNORE_INDEX)]),
        reference_losses=None if losses is None else np.concatenate([losses, np.zeros(len(tail), losses.dtype)]),
    )


# -- rows that are cut -----------------------------------------------------------------------------------------------------


def check_cut_rows(name: str, rows: Any, collator: MediaCollator, cutoff_len: int) -> None:
    """Raises DataError naming a row whose images, videos or audio cutoff_len has cut: the model refuses a batch in which
    placeholders and what they stand for differ in number."""
    from llamafactory.extras.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

    marks, token_ids = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, AUDIO_PLACEHOLDER), collator.token_ids
    for first in range(0, len(rows), ROWS_PER_READ):
        numbers = np.arange(first, min(first + ROWS_PER_READ, len(rows)))
        lengths = rows.read_block(int(numbers[0]), int(numbers[-1]) + 1)[0]
        cut = numbers[lengths >= cutoff_len - 1]
        for (ids, _), media in zip(rows.fetch(cut), rows.media(cut), strict=True) if len(cut) else ():
            counts = (len(media.images), len(media.videos), len(media.audios))
            text = "".join(mark * count for mark, count in zip(marks, counts, strict=True))
            wanted = int(np.isin(collator.placeholders(text, media), token_ids).sum()) if media else 0
            found = int(np.isin(ids, token_ids).sum())
            if found != wanted:
                files = ", ".join(str(item) for _, item in media.items() if isinstance(item, str))
                raise DataError(
                    f"cutoff_len: {cutoff_len} leaves {found} of the {wanted} tokens of {files or 'its media'} in a row of "
                    f"dataset {name!r}; raise cutoff_len, or shorten the text or image_max_pixels"
                )
