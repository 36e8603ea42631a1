"""Which megatron-core this engine works with; said before anything of it is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from dataflex_mega.errors import UserError

OLDEST, NEWEST = (0, 16, 1), (0, 20)  # the second is excluded


def check() -> str:
    """The installed version. Raises UserError without megatron-core or with an unsupported version."""
    supported = f"{'.'.join(map(str, OLDEST))} up to but not {'.'.join(map(str, NEWEST))}"
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise UserError(f'engine: megatron needs megatron-core {supported}: pip install "dataflex_mega[megatron]"')
    installed = importlib.metadata.version("megatron-core")
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in installed.split(".")[:3])
    if not OLDEST <= numbers < NEWEST:
        raise UserError(f"engine: megatron: megatron-core {installed} is installed; {supported} is supported")
    return installed
