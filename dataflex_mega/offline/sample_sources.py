"""Sources of samples to embed: the samples of a training configuration, or the rows of a JSON file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataflex_mega.data.pairs import answered_tokens
from dataflex_mega.data.pool import SamplePool
from dataflex_mega.data.row_validation import first_bad_row
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.offline.encoders import EmbedInput

ALPACA_FIELDS = ("instruction", "input", "output")  # joined to a row's text where it has no `text`
SUFFIXES = (".json", ".jsonl")


class SampleSource(Protocol):
    """Samples in a fixed order."""

    identity: dict[str, Any]  # of the data, plain values

    def __len__(self) -> int: ...

    def fetch(self, rows: np.ndarray) -> list[EmbedInput]:
        """[n] row numbers -> the samples in that order."""
        ...


class PoolSource:
    """The samples of a run's pools: tokens, and the text that the tokenizer decodes them to; of a pair the chosen answer."""

    def __init__(self, pools: Sequence[SamplePool], tokenizer: Any) -> None:
        """`pools` are concatenated, such as the evaluation sets."""
        self.pools, self.tokenizer = pools, tokenizer
        self.ends = np.cumsum([len(pool) for pool in pools])
        hashes: dict[str, str] = {}
        for pool in pools:
            hashes |= pool.content_hash()
        self.identity = {"pool": hashes}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def fetch(self, rows: np.ndarray) -> list[EmbedInput]:
        inputs: list[EmbedInput | None] = [None] * len(rows)
        pool_numbers = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(pool_numbers):
            pool, positions = self.pools[number], np.flatnonzero(pool_numbers == number)
            samples = pool.fetch(rows[positions] - (self.ends[number] - len(pool)))
            tokens = [answered_tokens(sample) for sample in samples]
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for position, ids, text in zip(positions, tokens, texts, strict=True):
                inputs[position] = EmbedInput(text, ids)
        return [one for one in inputs if one is not None]


class FileSource:
    """Rows of a .json or .jsonl file: `text`, or instruction, input and output joined by newlines."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file cannot be read or has no rows."""
        import datasets
        from datasets.exceptions import DatasetGenerationError

        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path}: expected a training configuration (.yaml) or rows ({', '.join(SUFFIXES)})")
        if not path.is_file():
            raise ConfigError(f"{path}: not found (relative to {Path.cwd()})")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would print its error besides ours
        try:  # memory-mapped arrow files: rows are not held in memory
            self.rows: Any = datasets.load_dataset("json", data_files=str(path), split="train")
        except (DatasetGenerationError, ValueError, StopIteration) as error:
            problem = (
                first_bad_row(path, None) or f"{path}: cannot be read as rows of JSON: {str(error).splitlines()[0]}"
            )
            raise DataError(problem) from error
        self.path, self.identity = path, {"file": digest[:16]}
        if len(self.rows) == 0:
            raise DataError(f"{path}: has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: np.ndarray) -> list[EmbedInput]:
        columns: Mapping[str, list[Any]] = self.rows[rows.tolist()]
        inputs = []
        for position, row in enumerate(rows.tolist()):
            text = row_text({name: values[position] for name, values in columns.items()})
            if text is None:
                names = ", ".join(columns)
                raise DataError(f"{self.path} row {row}: expected text, or instruction and output; it has {names}")
            inputs.append(EmbedInput(text))
        return inputs


def row_text(row: Mapping[str, Any]) -> str | None:
    """The text of a row; None when it has none of the fields."""
    if isinstance(row.get("text"), str):
        return row["text"]
    texts = [row[name] for name in ALPACA_FIELDS if isinstance(row.get(name), str) and row[name]]
    return "\n".join(texts) if texts else None
