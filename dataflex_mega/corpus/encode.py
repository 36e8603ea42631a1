"""Texts -> token ids with a Hugging Face tokenizer, an end token after each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dataflex_mega.data.manifest import CorpusTokenizer, tokenizer_fingerprint
from dataflex_mega.errors import ConfigError

LARGEST_UINT16 = 65500  # from this vocabulary size on Megatron writes int32


class Encoder:
    """A tokenizer and the layout of its ids.

    Args:
        folder: a Hugging Face tokenizer, as `model_name_or_path` is.

    Raises:
        ConfigError: it cannot be loaded, or has no end token.
    """

    def __init__(self, folder: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the first call; processes share the cores already
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--tokenizer {folder}: {first}") from error
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"--tokenizer {folder}: it has no end token (eos_token), which ends each document")
        self.end = int(self.tokenizer.eos_token_id)
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = "uint16" if self.vocabulary < LARGEST_UINT16 else "int32"
        self._fast: Any = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        if self._fast is not None:  # a tokenizer.json may hold both, and a text must stay whole
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """n texts -> n arrays of `dtype`, the end token last; special tokens are added nowhere else."""
        if self._fast is not None:
            found = [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            found = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray([*ids, self.end], dtype=self.dtype) for ids in found]

    def identity(self) -> CorpusTokenizer:
        """What the manifest says of the tokenizer."""
        return CorpusTokenizer(tokenizer_fingerprint(self.tokenizer), self.vocabulary, self.end)


@lru_cache(maxsize=1)
def encoder(folder: str) -> Encoder:
    """The encoder of this process, loaded once."""
    return Encoder(folder)
