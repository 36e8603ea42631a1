"""Texts -> token ids with a Hugging Face tokenizer, an end-of-document token after each text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dataflex_mega.data.manifest import CorpusTokenizer, tokenizer_fingerprint
from dataflex_mega.errors import ConfigError

MIN_INT32_VOCAB_SIZE = 65500  # Megatron writes int32 for vocabularies of this size or more


class DocumentTokenizer:
    """A tokenizer and the dtype of its ids.

    Args:
        folder: a Hugging Face tokenizer, as `model_name_or_path` is.

    Raises:
        ConfigError: it cannot be loaded, or has no end-of-text token.
    """

    def __init__(self, folder: str) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the first call; processes share the cores already
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--tokenizer {folder}: {reason}") from error
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"--tokenizer {folder}: it has no end token (eos_token), which ends each document")
        self.eod_token_id = int(self.tokenizer.eos_token_id)
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.dtype = "uint16" if self.vocab_size < MIN_INT32_VOCAB_SIZE else "int32"
        self._backend: Any = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        if self._backend is not None:  # a tokenizer.json may set both, and documents must stay whole
            self._backend.no_truncation()
            self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """n texts -> n arrays of `dtype`, each ending in the end-of-document token; no other special tokens are added."""
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            all_ids = [encoding.ids for encoding in encodings]
        else:
            all_ids = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray([*ids, self.eod_token_id], dtype=self.dtype) for ids in all_ids]

    def identity(self) -> CorpusTokenizer:
        """The tokenizer's entry in the manifest of a corpus."""
        return CorpusTokenizer(tokenizer_fingerprint(self.tokenizer), self.vocab_size, self.eod_token_id)


@lru_cache(maxsize=1)
def document_tokenizer(folder: str) -> DocumentTokenizer:
    """The tokenizer of this process, loaded once."""
    return DocumentTokenizer(folder)
