"""DataFlex's keys with their names and defaults, and ours: typed, checked, and turned into roles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex_mega.config import components, proportions
from dataflex_mega.config.components import ROLE_OF_TYPE, SECTIONS, Spec
from dataflex_mega.config.values import fit
from dataflex_mega.errors import ConfigError, did_you_mean

TRAIN_TYPES = ("static", "dynamic_select", "dynamic_mix", "dynamic_weight", "dynamic")
ALIASES = {"static_full": "static", "dynamic_weighting": "dynamic_weight"}
LATER_TYPES = ("dynamic_reorder", "dynamic_lego")
ROLES = tuple(SECTIONS)


@dataclass(frozen=True)
class RunArguments:
    """Everything that is neither LLaMA-Factory's nor Megatron's. Made by `parse`, which checks it all."""

    # DataFlex's
    train_type: str = field(
        default="static",
        metadata={
            "help": (
                "`static`: LLaMA-Factory's own training. `dynamic_select`, `dynamic_mix`, `dynamic_weight`: one role, "
                "named by `component_name` or by the role's key. `dynamic`: the roles whose keys are set, which is also "
                "what leaving `train_type` out means when one is"
            )
        },
    )
    components_cfg_file: str | None = field(
        default=None, metadata={"help": "a components file in DataFlex's layout; None: the packaged one"}
    )
    component_name: str | None = field(
        default=None, metadata={"help": "the entry of the components file that `train_type` uses"}
    )
    warmup_step: int = field(
        default=0, metadata={"help": "optimizer steps on the initial data before the first update, >= 0"}
    )
    update_step: int = field(
        default=0,
        metadata={"help": "optimizer steps from one update to the next; >= 1 when a selector or a mixer moves"},
    )
    update_times: int = field(default=1, metadata={"help": "updates; below 0: until the end (selecting: 0 too)"})
    static_mix: bool = field(
        default=False, metadata={"help": "keep `init_mixture_proportions` for the whole run: the mixer `static`"}
    )
    train_step: int = field(
        default=0,
        metadata={"help": "optimizer steps of the run; 0: `max_steps`, else what the schedule comes to, else epochs"},
    )
    freeze_gate: bool = field(default=False, metadata={"help": "do not train the routers of mixture-of-experts layers"})
    early_stopping_min_delta: float = field(
        default=0.0, metadata={"help": "smallest improvement that counts for `early_stopping_steps`, >= 0"}
    )
    mixture_sample_rule: Literal["mixture", "stratified", "uniform"] | None = field(
        default=None,
        metadata={
            "help": (
                "proportions at the start. `mixture`: `init_mixture_proportions`, equal without them. `stratified`: by "
                "size. `uniform`: equal. None: `mixture` with a mixer, else `init_mixture_proportions`, by size without"
            )
        },
    )
    init_mixture_proportions: list[float] | None = field(
        default=None,
        metadata={"help": "one number >= 0 for each dataset, in the order of `dataset`, taken relative to their sum"},
    )
    init_mixture_proportions_file: str | None = field(
        default=None,
        metadata={
            "help": (
                "a file with those numbers in place of the list, such as the `doremi_average_weights.json` or "
                "`doremi_step3_proportions.txt` of a DoReMi run"
            )
        },
    )
    mixer_eval_dataset: str | list[str] | None = field(
        default=None, metadata={"help": "evaluation sets for a mixer that asks for them; none does yet"}
    )
    # ours
    corpus_dir: str | None = field(
        default=None, metadata={"help": "folder of a corpus of .bin/.idx files, whose domains `dataset` names, or all"}
    )
    eval_corpus_dir: str | None = field(
        default=None, metadata={"help": "one whose domains are evaluation sets; `eval_dataset` names some, all without"}
    )
    engine: Literal["auto", "fsdp", "megatron"] = field(
        default="auto",
        metadata={
            "help": (
                "what trains: `fsdp` Hugging Face models, `megatron` models of megatron-core. `auto`: `megatron` when one of "
                "its keys or USE_MCA=1 asks for it, else `fsdp`"
            )
        },
    )
    selector: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "chooses samples: a name, or `name` with parameters"}
    )
    mixer: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "sets domain proportions: a name, or `name` with parameters"}
    )
    weighter: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "weighs samples in the loss: a name, or `name` with parameters"}
    )
    min_proportion: float | list[float] | None = field(
        default=None,
        metadata={"help": "floor of a mixer's proportions, 0..1: one for all datasets, or one for each"},
    )
    max_proportion: float | list[float] | None = field(
        default=None,
        metadata={"help": "cap of a mixer's proportions, 0..1: one for all datasets, or one for each"},
    )
    max_epochs: float | list[float] | None = field(
        default=None,
        metadata={
            "help": (
                "how often a mixer may have a dataset drawn, > 0: one for all datasets, or one for each. One that has been "
                "drawn that often is not drawn any more"
            )
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={"help": "folder of the reference model of `doremi`, `rho_loss` and `rho1`, in Hugging Face layout"},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": (
                "folder of that model's token losses, built when it is not there; None: `reference` in `output_dir`. "
                "Without `reference_model`: one that `dataflex-cli reference` has built"
            )
        },
    )
    reference_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of the token losses in `reference_cache`"}
    )
    callbacks: list[str] = field(
        default_factory=list, metadata={"help": "transformers.TrainerCallback classes, as `package.module:Class`"}
    )
    lookahead: Literal["micro", "exact"] = field(
        default="micro",
        metadata={
            "help": (
                "whose losses a weighter compares under accumulation. `micro`: one micro-batch of all ranks. `exact`: "
                "the whole step, for one more forward pass"
            )
        },
    )
    loss_normalization: Literal["token", "sample"] = field(
        default="token", metadata={"help": "what each counts the same: target tokens or samples"}
    )
    nan_loss: Literal["stop", "continue"] = field(
        default="stop", metadata={"help": "at a loss or gradient that is not finite: stop, or skip the step"}
    )
    resume_ignore: list[str] = field(
        default_factory=list,
        metadata={"help": "differences from the checkpoint to accept, such as `global_batch_size`"},
    )
    score_batch_size: int | None = field(
        default=None, metadata={"help": "samples scored at once on a rank; None: `per_device_eval_batch_size`"}
    )
    prefetch: int = field(default=2, metadata={"help": "optimizer steps of data prepared ahead, >= 0"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard scalars"})

    def __post_init__(self) -> None:
        for key, least in LEAST.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key}: must be >= {least}, found {value}")
        if not math.isfinite(self.early_stopping_min_delta):
            raise ConfigError(f"early_stopping_min_delta: must be finite, found {self.early_stopping_min_delta}")
        check_proportions("init_mixture_proportions", self.init_mixture_proportions)
        for key, most in MOST.items():
            proportions.check_limit(key, getattr(self, key), most)
        for name in self.callbacks:
            module, colon, cls = name.partition(":")
            if not colon or not all(part.isidentifier() for part in [*module.split("."), cls]):
                raise ConfigError(f"callbacks: expected package.module:Class, found {name!r}")

    def roles(self) -> dict[str, Spec | None]:
        """selector, mixer, weighter -> the flat specification of the one that is on, or None. Raises ConfigError."""
        chosen = ROLE_OF_TYPE.get(self.train_type)
        found: dict[str, Spec | None] = {}
        for role in ROLES:
            component, own = None, getattr(self, role)
            if role == chosen and self.component_name is not None and not (role == "mixer" and self.static_mix):
                component = components.pick(self.components_cfg_file, role, self.component_name)
            found[role] = components.combine(role, own, component, self.component_name)
        if self.static_mix:
            found["mixer"] = self._static_mixer(found["mixer"])
        return found

    def _static_mixer(self, given: Spec | None) -> Spec:
        if given is not None and given["name"] != "static":
            raise ConfigError(
                f"static_mix: true keeps the proportions, but mixer: {given['name']} moves them; drop one"
            )
        if self.init_mixture_proportions is None or (given or {}).get("proportions") is not None:
            return given or {"name": "static"}
        return {"name": "static", "proportions": list(self.init_mixture_proportions)}

    def initial_proportions(self, sizes: Sequence[int], names: Sequence[str] | None = None) -> tuple[float, ...]:
        """[k] numbers of samples -> [k] proportions before any update, sum 1.

        Raises ConfigError for another length, and when a file that has names has not these `names` in this order.
        """
        if names is not None and self.init_mixture_proportions_file is not None:
            proportions.check_names(self.init_mixture_proportions_file, names)
        mixer = self.roles()["mixer"]
        key, given = _given_proportions(self, mixer)
        if given is None:
            equal = self.mixture_sample_rule in ("mixture", "uniform")
            equal = equal or (mixer is not None and self.mixture_sample_rule is None)
            given = [1.0] * len(sizes) if equal else [float(size) for size in sizes]
        if len(given) != len(sizes):
            raise ConfigError(f"{key}: {len(given)} numbers for {len(sizes)} datasets")
        total = math.fsum(given)
        return tuple(x / total for x in given)


LEAST = {
    "warmup_step": 0, "update_step": 0, "train_step": 0, "prefetch": 0, "score_batch_size": 1,
    "early_stopping_min_delta": 0,
}  # fmt: skip
MOST = {"min_proportion": 1.0, "max_proportion": 1.0, "max_epochs": math.inf}
# The keys that mean nothing without a role; the other ones of ours are options of the engine or mean something always.
ROLE_KEYS = (
    "component_name", "warmup_step", "update_step", "update_times", "static_mix", "train_step", "freeze_gate",
    "early_stopping_min_delta", "mixture_sample_rule", "init_mixture_proportions", "init_mixture_proportions_file",
    "mixer_eval_dataset", *MOST, "reference_model", "reference_cache", "reference_dtype", *ROLES,
)  # fmt: skip
ENGINE_OPTIONS = (
    "lookahead", "loss_normalization", "nan_loss", "resume_ignore", "score_batch_size", "prefetch", "tensorboard"
)  # fmt: skip
# Of those, the ones whose loss would change what is trained; DataFlex ignores the others in static training, and says so.
NOT_STATIC = {
    **dict.fromkeys(ROLES, "drop train_type or choose dynamic_*"),
    "static_mix": "choose train_type: dynamic_mix",
    "init_mixture_proportions": "choose train_type: dynamic_mix",
    "init_mixture_proportions_file": "choose train_type: dynamic_mix",
    **dict.fromkeys(MOST, "choose train_type: dynamic_mix"),
    "train_step": "use max_steps",
    "freeze_gate": "choose a dynamic train_type",
    "early_stopping_min_delta": "choose a dynamic train_type",
}
LOOKALIKES = {"warmup_step": "; the learning rate's warm-up is warmup_steps", "train_step": "; or use max_steps"}


def check_proportions(key: str, given: Sequence[float] | None) -> None:
    """Raises ConfigError unless they are finite, >= 0 and not all 0."""
    if given is None:
        return
    if not given or not all(math.isfinite(x) and x >= 0 for x in given) or sum(given) <= 0:
        raise ConfigError(f"{key}: expected numbers that are finite, >= 0 and not all 0, found {list(given)}")


def parse(values: Mapping[str, Any]) -> tuple[RunArguments, list[str]]:
    """Our keys of a configuration -> (checked arguments, notes for the user).

    Raises ConfigError naming the key for a wrong type, a value out of range, an algorithm or parameter that does not
    exist, keys that contradict each other, and keys that would have no effect.
    """
    annotations = {f.name: str(f.type) for f in fields(RunArguments)}
    typed = {key: fit(key, value, annotations[key]) for key, value in values.items()}
    typed["train_type"] = _train_type(typed)
    check_proportions("init_mixture_proportions", typed.get("init_mixture_proportions"))
    if typed.get("init_mixture_proportions_file") is not None and typed["train_type"] != "static":
        if typed.get("init_mixture_proportions") is not None:
            raise ConfigError("init_mixture_proportions_file: init_mixture_proportions is set too; drop one")
        typed["init_mixture_proportions"] = proportions.read(typed["init_mixture_proportions_file"])
    if typed.get("init_mixture_proportions") is not None:
        total = math.fsum(typed["init_mixture_proportions"])
        typed["init_mixture_proportions"] = [x / total for x in typed["init_mixture_proportions"]]
    if typed["train_type"] == "static":
        return RunArguments(**typed), _check_static(typed, explicit="train_type" in values)
    notes = []
    if typed.get("static_mix") and typed.get("selector") is None:
        notes = _static_mix_notes(typed)
        typed["update_step"] = 0  # so that the length of the run is train_step or epochs, as in DataFlex
    if typed.get("mixer_eval_dataset") is not None:
        notes.append("mixer_eval_dataset: no mixer reads it yet")
    arguments = RunArguments(**typed)
    _check_roles(arguments)
    return arguments, notes


def _train_type(values: Mapping[str, Any]) -> str:
    given = values.get("train_type")
    if given is None:
        on = any(values.get(role) is not None for role in ROLES) or values.get("static_mix")
        return "dynamic" if on else "static"
    name = ALIASES.get(given, given)
    if name in LATER_TYPES:
        raise ConfigError(f"train_type: {given} is not available yet; allowed: {', '.join(TRAIN_TYPES)}")
    if name not in TRAIN_TYPES:
        near = did_you_mean(given, [*TRAIN_TYPES, *ALIASES])
        raise ConfigError(f"train_type: expected one of {', '.join(TRAIN_TYPES)}, found {given!r}{near}")
    return name


def _set(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Those of `keys` that have another value than their default."""
    defaults = RunArguments()
    return [key for key in keys if key in values and values[key] != getattr(defaults, key)]


def _check_static(values: Mapping[str, Any], explicit: bool) -> list[str]:
    """Static training heeds none of the role keys. Asked for, that is noted; derived, they were meant to do something."""
    idle = _set(values, ROLE_KEYS)
    if not explicit and idle:
        key = idle[0]
        raise ConfigError(
            f"{key}: has no effect without a role; set selector, mixer, weighter or train_type{LOOKALIKES.get(key, '')}"
        )
    for key in idle:
        if key in NOT_STATIC:
            raise ConfigError(f"{key}: has no effect with train_type: {values['train_type']}; {NOT_STATIC[key]}")
    idle += _set(values, ENGINE_OPTIONS)
    return [f"static training does not use {', '.join(idle)}"] if idle else []


def _static_mix_notes(values: Mapping[str, Any]) -> list[str]:
    idle = _set(values, ("component_name", "update_step", "update_times"))
    return [f"static_mix: true keeps the proportions; {', '.join(idle)} not used"] if idle else []


def _given_proportions(arguments: RunArguments, mixer: Spec | None) -> tuple[str, list[float] | None]:
    """(key, numbers) that the run starts with: init_mixture_proportions, else the mixer's own."""
    if arguments.init_mixture_proportions is not None:
        return "init_mixture_proportions", list(arguments.init_mixture_proportions)
    for key in ("proportions", "initial_proportions"):
        if (mixer or {}).get(key) is not None:
            return f"mixer.{key}", list((mixer or {})[key])
    return "init_mixture_proportions", None


def _check_roles(arguments: RunArguments) -> None:
    """The roles exist, with these parameters, and the schedule lets them do something."""
    roles = arguments.roles()
    wanted = ROLE_OF_TYPE.get(arguments.train_type)
    if wanted is None and arguments.component_name is not None:
        types = ", ".join(ROLE_OF_TYPE)
        raise ConfigError(
            f"component_name: {arguments.component_name!r} needs a train_type that says its role: {types}"
        )
    if wanted is not None and roles[wanted] is None:
        names = ", ".join(components.entries(arguments.components_cfg_file, wanted))
        raise ConfigError(f"train_type: {arguments.train_type} needs component_name (one of {names}) or {wanted}")
    if not any(roles.values()):
        raise ConfigError("train_type: dynamic needs at least one of selector, mixer, weighter")
    from dataflex_mega.registry import validate  # here, since it imports torch

    for role, spec in roles.items():
        if spec is not None:
            validate(role, spec)
    mixer = roles["mixer"]
    _check_mixture(arguments, mixer)
    _check_limits(arguments, roles)
    moving = "selector" if roles["selector"] else "mixer" if mixer and mixer["name"] != "static" else None
    if moving and arguments.update_step < 1:
        name = (roles[moving] or {})["name"]
        raise ConfigError(f"update_step: must be >= 1 for {moving} {name} to act, found {arguments.update_step}")


def _check_limits(arguments: RunArguments, roles: Mapping[str, Spec | None]) -> None:
    """Limits are those of a mixer's proportions, and epochs are counted in draws from the whole pool."""
    for key in MOST:
        if getattr(arguments, key) is not None and roles["mixer"] is None:
            raise ConfigError(f"{key}: has no effect without a mixer; mixer: static draws in fixed proportions")
    if arguments.max_epochs is not None and roles["selector"] is not None:
        raise ConfigError("max_epochs: does not go with a selector, which draws its choice once each; drop one")


def _check_mixture(arguments: RunArguments, mixer: Spec | None) -> None:
    """Initial proportions, the sampling rule and the mixer do not contradict each other."""
    rule, initial = arguments.mixture_sample_rule, arguments.init_mixture_proportions
    if rule in ("stratified", "uniform"):
        if initial is not None:
            raise ConfigError(f"init_mixture_proportions: has no effect with mixture_sample_rule: {rule}; use mixture")
        if mixer is not None and (mixer["name"] != "static" or mixer.get("proportions") is not None):
            raise ConfigError(
                f"mixture_sample_rule: {rule} fixes the proportions, mixer {mixer['name']} could not set them; use mixture"
            )
    for key in ("proportions", "initial_proportions"):
        own = (mixer or {}).get(key)
        if own is None or initial is None:
            continue
        same = len(own) == len(initial) and all(
            math.isclose(x / sum(own), y) for x, y in zip(own, initial, strict=True)
        )
        if not same:
            raise ConfigError(f"mixer.{key}: {own} differs from init_mixture_proportions {initial}; drop one")
