"""How a run with a role is laid out when something else than its own keys says so: a DeepSpeed configuration, or the
variables of `accelerate launch`. Both become this package's keys, before LLaMA-Factory sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from dataflex_mega.config import accelerate_environment, deepspeed
from dataflex_mega.config.accelerate_environment import LAYOUT_VARIABLES
from dataflex_mega.config.deepspeed_values import Ranks
from dataflex_mega.config.launcher_keys import LauncherKeys, contradiction
from dataflex_mega.config.megatron import MegatronArguments
from dataflex_mega.errors import ConfigError

OTHER_TRAINERS = {
    "USE_RAY": "Ray starts processes itself; torchrun --nproc_per_node N does it here (train_type: static uses Ray)",
    "USE_V1": "LLaMA-Factory's other trainer has keys of its own; unset it",
}
RAY_KEYS: dict[str, Any] = {"ray_num_workers": 1, "ray_init_kwargs": None}  # with their defaults


class Resolved(NamedTuple):
    """What a run has beside what its configuration says."""

    llamafactory: dict[str, Any]  # the keys of the configuration, with those of launchers
    megatron: dict[str, Any]
    notes: list[str]


def resolve(
    lf: Mapping[str, Any], megatron: Mapping[str, Any], arguments: MegatronArguments, engine: str, environment: Any
) -> Resolved:
    """The keys of a run with a role.

    Args:
        lf: LLaMA-Factory's keys, `deepspeed` among them.
        megatron: Megatron's keys, as they are in the configuration.
        arguments: the same, checked.
        engine: of the run.
        environment: the variables with which the program was started; None where they do not matter.

    Raises:
        ConfigError: what cannot be heeded, by name, and both sides of a contradiction.
    """
    own = {key: value for key, value in lf.items() if key != deepspeed.KEY}
    keys = LauncherKeys(own)
    variables: Mapping[str, str] = environment or {}
    _refuse_other_trainers(variables, own)
    ranks = Ranks(engine, data_parallel_ranks(environment, arguments), megatron)
    found = accelerate_environment.translate(variables, keys, ranks)
    config = lf.get(deepspeed.KEY)
    if config:
        _refuse_two_layouts(own, variables)
        found |= deepspeed.translate(config, keys, ranks)
    return Resolved({**own, **keys.taken}, found, keys.notes)


@contextmanager
def preserved(environment: MutableMapping[str, str]) -> Iterator[None]:
    """A block after which these variables are again what they were: a run changes them, and the next one in this process
    was started alike."""
    before = {name: value for name, value in environment.items() if LAYOUT_VARIABLES.fullmatch(name)}
    try:
        yield
    finally:
        withdraw(environment)
        environment.update(before)


def withdraw(environment: MutableMapping[str, str]) -> None:
    """Remove the variables that were translated, on which LLaMA-Factory and transformers would act again."""
    for name in list(environment):
        if LAYOUT_VARIABLES.fullmatch(name):
            del environment[name]


def without_traces(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, without a precision that transformers left there in a program that no launcher started."""
    launched = {"ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED"} & set(environment)
    return {key: value for key, value in environment.items() if launched or key != "ACCELERATE_MIXED_PRECISION"}


def data_parallel_ranks(environment: Mapping[str, str] | None, arguments: MegatronArguments) -> int | None:
    """How many processes share a global batch; None where it is not known how many there are."""
    if environment is None or not environment.get("WORLD_SIZE", "1").isdecimal():
        return None
    shared = arguments.tensor_model_parallel_size * arguments.pipeline_model_parallel_size
    return max(1, int(environment.get("WORLD_SIZE", "1")) // (shared * arguments.context_parallel_size))


def _refuse_other_trainers(environment: Mapping[str, str], own: Mapping[str, Any]) -> None:
    for variable, instead in OTHER_TRAINERS.items():
        if environment.get(variable, "0").lower() in ("1", "y", "true"):
            raise ConfigError(f"{variable}={environment[variable]}: not supported with a role; {instead}")
    for key, default in RAY_KEYS.items():
        if own.get(key, default) not in (default, None):
            raise ConfigError(f"{key}: not supported with a role; {OTHER_TRAINERS['USE_RAY']}")


def _refuse_two_layouts(own: Mapping[str, Any], variables: Mapping[str, str]) -> None:
    for key in ("fsdp", "fsdp_config"):
        if own.get(key):
            raise ConfigError(f"{deepspeed.KEY} and {key}: both lay the run out; drop one of them")
    if accelerate_environment.is_true(variables, "ACCELERATE_USE_FSDP"):
        raise ConfigError(contradiction(deepspeed.KEY, "ACCELERATE_USE_FSDP=true (accelerate launch)"))
