"""DataFlex's keys with their names and defaults, and ours: the fields of one dataclass, each with its help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dataflex_mega.config import components, orders, pipelines, proportions
from dataflex_mega.config.components import ROLE_OF_TYPE, SECTIONS, Spec
from dataflex_mega.errors import ConfigError

ROLES = tuple(SECTIONS)


@dataclass(frozen=True)
class RunArguments:
    """Everything that is neither LLaMA-Factory's nor Megatron's. Made by `parse`, which checks it all."""

    # DataFlex's
    train_type: str = field(
        default="static",
        metadata={
            "help": (
                "`static`: LLaMA-Factory's own training. `dynamic_select`, `dynamic_mix`, `dynamic_reorder`, "
                "`dynamic_weight`: one role, named by `component_name` or by the role's key. `dynamic_lego`: a pipeline of "
                "stages, each with its own clock. `dynamic`: the roles "
                "whose keys are set, which is also what leaving `train_type` out means when one is"
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
                "`doremi_step3_proportions.txt` of a DoReMi run; or the `manifest.json` of a corpus, for its shares of "
                "tokens, found by name"
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
                "what trains: `fsdp` Hugging Face models, `megatron` models of megatron-core. `auto`: `megatron` when one "
                "of its keys or USE_MCA=1 asks for it, else `fsdp`"
            )
        },
    )
    selector: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "chooses samples: a name, or `name` with parameters"}
    )
    mixer: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "sets domain proportions: a name, or `name` with parameters"}
    )
    reorder: str | dict[str, Any] | None = field(
        default=None,
        metadata={"help": "orders samples by score: a pattern, or `name` with its parameters and those of any order"},
    )
    pipeline: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": (
                "with `train_type: dynamic_lego`: `stages` and what a preset of the components file may have, or the name "
                "of one; beside `component_name` it changes that preset"
            )
        },
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
    plugins: list[str] = field(
        default_factory=list,
        metadata={"help": "modules to import, whose decorators register algorithms under names of their own"},
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
    candidates: float = field(
        default=1.0,
        metadata={
            "help": (
                "share of each dataset that a selector considers at an update, 0 < share <= 1. Every update considers "
                "another part, until all samples have had their turn"
            )
        },
    )
    rescore: Literal["full", "incremental"] = field(
        default="full",
        metadata={
            "help": (
                "what may be chosen where `candidates` is below 1. `full`: what this update has scored. `incremental`: "
                "that, and what earlier updates have scored, by the latest score of each"
            )
        },
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
        """selector, mixer, reorder, weighter -> the flat specification of the one that is on, or None. That of a reorder is
        its pattern's alone; see `order`. Raises ConfigError."""
        found = self._specs()
        if found["reorder"] is not None:
            found["reorder"] = orders.read(found["reorder"])[0]
        return found

    def order(self) -> orders.OrderArguments | None:
        """How samples are scored and ordered when `reorder` is on."""
        spec = self._specs()["reorder"]
        return None if spec is None else orders.read(spec)[1]

    def stages(self) -> pipelines.Pipeline | None:
        """The pipeline of `dynamic_lego`."""
        if self.train_type != pipelines.LEGO:
            return None
        return pipelines.read(self.components_cfg_file, self.component_name, self.pipeline)

    def _specs(self) -> dict[str, Spec | None]:
        pipeline = self.stages()
        if pipeline is not None:
            first = pipeline.weighing[0] if pipeline.weighing else None
            return {**dict.fromkeys(ROLES), **pipeline.specs, "weighter": first}
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
        file = self.init_mixture_proportions_file
        if names is not None and file is not None:
            if self.init_mixture_proportions is None:
                return tuple(proportions.natural(file, names))
            proportions.check_names(file, names)
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


def check_proportions(key: str, given: Sequence[float] | None) -> None:
    """Raises ConfigError unless they are finite, >= 0 and not all 0."""
    if given is None:
        return
    if not given or not all(math.isfinite(x) and x >= 0 for x in given) or sum(given) <= 0:
        raise ConfigError(f"{key}: expected numbers that are finite, >= 0 and not all 0, found {list(given)}")


def _given_proportions(arguments: RunArguments, mixer: Spec | None) -> tuple[str, list[float] | None]:
    """(key, numbers) that the run starts with: init_mixture_proportions, else the mixer's own."""
    if arguments.init_mixture_proportions is not None:
        return "init_mixture_proportions", list(arguments.init_mixture_proportions)
    for key in ("proportions", "initial_proportions"):
        if (mixer or {}).get(key) is not None:
            return f"mixer.{key}", list((mixer or {})[key])
    return "init_mixture_proportions", None
