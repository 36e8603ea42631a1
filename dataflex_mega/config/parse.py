"""One configuration, three owners: LLaMA-Factory's keys, ours, Megatron's. An unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dataflex_mega.config import corpus, dataflex_parse, interleave, launchers, legacy, megatron
from dataflex_mega.config.component_parameters import Spec
from dataflex_mega.config.dataflex_arguments import RunArguments
from dataflex_mega.config.fates_newer import NEWER_FATES
from dataflex_mega.config.interleave import Interleaving
from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.config.numbers import check_numbers
from dataflex_mega.config.pipelines import Pipeline
from dataflex_mega.config.proportions import initial_proportions
from dataflex_mega.config.reorder_arguments import ReorderArguments
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.redaction import learn
from dataflex_mega.schema.coercion import coerce_lenient

OUR_KEYS = frozenset(f.name for f in fields(RunArguments))
MEGATRON_KEYS = frozenset(f.name for f in fields(MegatronArguments))


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration, sorted by the owner of each key."""

    llamafactory: dict[str, Any]  # what goes to LLaMA-Factory, nothing of ours in it
    dataflex: RunArguments
    megatron: MegatronArguments
    engine: str  # of engines.capabilities.engine_names
    roles: dict[str, Spec]  # selector, mixer, reorder, weighter -> flat specification, of the active ones
    reorder: ReorderArguments | None  # how samples are scored and ordered; the pattern is in `roles`
    pipeline: Pipeline | None  # of `dynamic_lego`
    all_keys: dict[str, Any]  # old names replaced, LLaMA-Factory's values as in `llamafactory`
    notes: list[str]  # messages for the user, one line each
    interleaving: Interleaving | None = None  # of mix_strategy

    def initial_proportions(self, sizes: Sequence[int], names: Sequence[str]) -> tuple[float, ...]:
        """[k] proportions before the first update, from the configuration or from `sizes`, [k] numbers of samples."""
        return initial_proportions(self.dataflex, self.roles.get("mixer"), sizes, names)


def parse_config(
    config: Mapping[str, Any],
    lf_types: Mapping[str, Any],
    variable: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> RunConfig:
    """Sort the keys by owner, and parse and check every value once.

    Args:
        config: what `load` returns.
        lf_types: LLaMA-Factory's keys -> their annotations.
        variable: the environment variable that asks for Megatron, if one does.
        environment: the variables that a launcher has set, where they are to be heeded.

    Raises:
        ConfigError: unknown keys (all of them in one line, each with the nearest known one), a wrong value, two engines at
            once, or a launcher that contradicts the configuration.
    """
    learn(config)
    known = [*lf_types, *OUR_KEYS, *MEGATRON_KEYS, *megatron.ENGINE_KEYS]
    all_keys, notes = legacy.migrate_keys(config, set(known))
    all_keys = _without_harmless_newer(all_keys, known)
    _refuse_unknown(all_keys, known)
    megatron_arguments = megatron.parse({key: value for key, value in all_keys.items() if key in MEGATRON_KEYS})
    lf_values = {
        key: coerce_lenient(key, value, lf_types[key])
        for key, value in all_keys.items()
        if key in lf_types and key not in megatron.ENGINE_KEYS
    }
    check_numbers(lf_values, every=False)
    asking = [key for key in megatron.ENGINE_KEYS if coerce_lenient(key, all_keys.get(key, False), bool)]
    variable = variable or next(iter(asking), None)
    selecting_keys = megatron.keys_that_select_megatron(megatron_arguments)
    engine = megatron.resolve_engine(all_keys.get("engine", "auto"), selecting_keys, variable)
    own = engine == "megatron"  # the package's own loop, without a role too
    parsed = dataflex_parse.parse({key: value for key, value in all_keys.items() if key in OUR_KEYS}, uses_own_loop=own)
    corpus.check_engine(parsed.arguments, engine)
    lf_values.update(megatron.implied_lf_keys(megatron_arguments, lf_values))
    arguments, roles, interleaving = parsed.arguments, parsed.roles, None
    if arguments.train_type != "static" or own:  # else LLaMA-Factory trains, and hears of them itself
        arguments, roles, interleaving, notes = interleave.resolve(lf_values, arguments, roles, notes)
        megatron_keys = {key: value for key, value in all_keys.items() if key in MEGATRON_KEYS}
        launched = launchers.resolve(lf_values, megatron_keys, megatron_arguments, engine, environment)
        lf_values, notes = launched.llamafactory, [*notes, *launched.notes]
        megatron_arguments = megatron.parse({**megatron_keys, **launched.megatron})
        all_keys = {key: value for key, value in all_keys.items() if key != "deepspeed"} | launched.megatron
    return RunConfig(
        llamafactory=lf_values,
        dataflex=arguments,
        megatron=megatron.with_lf_keys(megatron_arguments, lf_values, engine),
        engine=engine,
        roles=roles.specs,
        reorder=roles.reorder,
        pipeline=roles.pipeline,
        all_keys={**all_keys, **lf_values},
        notes=[*notes, *parsed.notes, *megatron.notes_of(megatron_arguments)],
        interleaving=interleaving,
    )


def _without_harmless_newer(keys: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The keys but those of a later LLaMA-Factory that say nothing which the installed one would not do."""
    newer = {key: fate for key, fate in NEWER_FATES.items() if key not in known}
    return {key: value for key, value in keys.items() if key not in newer or not newer[key].is_harmless(value)}


def _about_unknown(key: str, known: list[str]) -> str:
    if key in NEWER_FATES:
        return " (of a later LLaMA-Factory than the installed one)"
    return did_you_mean(key, known) or _nearest_successor(key)


def _nearest_successor(key: str) -> str:
    """A hint for a misspelt old key: the old one that is nearest, and what it is called now."""
    old = next((name for name in legacy.OUR_RENAMED if did_you_mean(key, [name])), None)
    return "" if old is None else f" (did you mean {legacy.OUR_RENAMED[old][0]!r}, formerly {old!r}?)"


def _refuse_unknown(config: Mapping[Any, Any], known: list[str]) -> None:
    unknown = [str(key) for key in config if key not in known]
    if unknown:
        listed = ", ".join(f"{key!r}{_about_unknown(key, known)}" for key in unknown)
        raise ConfigError(f"unknown key{'s' if len(unknown) > 1 else ''} {listed}")
