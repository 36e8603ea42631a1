"""LLaMA-Factory's `streaming`: what it needs to be set, and what does not go with it."""

from __future__ import annotations

from pathlib import Path

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import ConfigError


def check_streaming(config: RunConfig) -> None:
    """Raises ConfigError for a stream without a length, and for keys that need its length or another copy of its rows."""
    lf = config.llamafactory
    if not lf.get("streaming"):
        return
    if not lf.get("max_steps") or lf["max_steps"] < 1:
        beside = f"; train_step: {config.dataflex.train_step} alone is not seen by LLaMA-Factory, set both"
        raise ConfigError(
            "streaming: needs max_steps, since a stream has no length of its own"
            + (beside if config.dataflex.train_step else "")
        )
    if lf.get("max_samples") is not None:
        raise ConfigError("max_samples: does not go with streaming: true; max_steps says how much is read")
    held_out = lf.get("val_size") or 0
    if 0 < held_out < 1 or held_out != int(held_out):
        raise ConfigError(f"val_size: with streaming: true it must be a number of rows, found {held_out:g}")
    if lf.get("buffer_size", 1) is not None and lf.get("buffer_size", 1) < 1:
        raise ConfigError(f"buffer_size: must be >= 1 with streaming: true, found {lf['buffer_size']}")
    path = lf.get("tokenized_path")
    if path and not (Path(path).expanduser().is_dir() and any(Path(path).expanduser().iterdir())):
        raise ConfigError(
            f"tokenized_path: {path} is not written with streaming: true, which keeps rows in output_dir; drop one of them"
        )
