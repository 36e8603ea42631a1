"""One configuration, three owners: LLaMA-Factory's keys, ours, Megatron's. A key that nobody knows is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dataflex_mega.config import corpus, legacy, megatron, ours
from dataflex_mega.config.arguments import RunArguments
from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.config.values import fit_loosely
from dataflex_mega.errors import ConfigError, did_you_mean

OUR_KEYS = frozenset(f.name for f in fields(RunArguments))
MEGATRON_KEYS = frozenset(f.name for f in fields(MegatronArguments))


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration."""

    lf: dict[str, Any]  # what goes to LLaMA-Factory, nothing of ours in it
    ours: RunArguments
    megatron: MegatronArguments
    engine: megatron.Engine
    raw: dict[str, Any]  # all keys, old names replaced, LLaMA-Factory's values as in `lf`
    notes: list[str]  # what the user should be told, a line each


def split(config: Mapping[str, Any], lf_keys: Mapping[str, str], variable: str | None = None) -> RunConfig:
    """Sort the keys by owner and check every value.

    Args:
        config: what `load` returns.
        lf_keys: LLaMA-Factory's keys -> their annotations as text.
        variable: the environment variable that asks for Megatron, if one does.

    Raises:
        ConfigError: unknown keys (all of them in one line, each with the nearest known one), a wrong value, or two
            engines at once.
    """
    raw, notes = legacy.modernise(config, {*lf_keys, *OUR_KEYS, *MEGATRON_KEYS})
    _refuse_unknown(raw, [*lf_keys, *OUR_KEYS, *MEGATRON_KEYS])
    layout = megatron.parse({key: value for key, value in raw.items() if key in MEGATRON_KEYS})
    lf = {key: fit_loosely(key, value, lf_keys[key]) for key, value in raw.items() if _is_lf(key, lf_keys)}
    if lf.pop(megatron.ENGINE_KEY, False):  # the key says what the variable does
        variable = variable or megatron.ENGINE_KEY
    engine = megatron.resolve_engine(raw.get("engine", "auto"), megatron.asking(layout), variable)
    mine = {key: value for key, value in raw.items() if key in OUR_KEYS}
    arguments, more = ours.parse(mine, own_loop=engine == "megatron")
    corpus.check_engine(arguments, engine)
    lf.update(megatron.as_lf_keys(layout, lf))
    return RunConfig(
        lf=lf,
        ours=arguments,
        megatron=layout,
        engine=engine,
        raw={**raw, **lf},
        notes=[*notes, *more, *megatron.notes_of(layout)],
    )


def _is_lf(key: str, lf_keys: Mapping[str, str]) -> bool:
    return key in lf_keys and key not in OUR_KEYS and key not in MEGATRON_KEYS


def _refuse_unknown(config: Mapping[Any, Any], known: list[str]) -> None:
    unknown = [str(key) for key in config if key not in known]
    if unknown:
        listed = ", ".join(f"{key!r}{did_you_mean(key, known)}" for key in unknown)
        raise ConfigError(f"unknown key{'s' if len(unknown) > 1 else ''} {listed}")
