"""The values of the key `engine`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dataflex_mega.engines.capabilities import engine_names
from dataflex_mega.errors import did_you_mean

AUTO = "auto"


@dataclass(frozen=True)
class EngineName:
    """A schema.constraints.Constraint: `auto` or an engine of the package."""

    def __str__(self) -> str:
        return " | ".join((AUTO, *engine_names()))

    def error(self, value: Any) -> str | None:
        """`expected one of auto, fsdp, megatron, found 'fdsp' (did you mean 'fsdp'?)`, or None for an engine."""
        allowed = (AUTO, *engine_names())
        if value in allowed:
            return None
        return f"expected one of {', '.join(allowed)}, found {value!r}{did_you_mean(str(value), allowed)}"
