"""Imported by the fork server of `runs.start`, so that a process of a run starts without import time."""

from dataflex_mega.llamafactory.compat import ensure_importable

ensure_importable()

import contextlib  # noqa: E402

import llamafactory.data  # noqa: E402
import llamafactory.model  # noqa: E402
import llamafactory.train.tuner  # noqa: E402
import peft  # noqa: E402

import dataflex_mega.train  # noqa: E402

with contextlib.suppress(ImportError):
    import dataflex_mega.engines.megatron.build
    import dataflex_mega.engines.megatron.conversion

LOADED = (llamafactory, peft, dataflex_mega)
