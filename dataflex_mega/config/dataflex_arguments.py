"""DataFlex's keys with their names and defaults, and ours: the fields of one dataclass, each with its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dataflex_mega.config.components import SECTIONS
from dataflex_mega.config.engine_names import EngineName
from dataflex_mega.errors import ConfigError
from dataflex_mega.schema.constraints import Range, RelativeWeights, check_fields

ROLES = tuple(SECTIONS)
LIMITS = ("min_proportion", "max_proportion", "max_epochs")  # of a mixer's proportions
Fraction = Range(ge=0, le=1)


@dataclass(frozen=True)
class RunArguments:
    """The keys that are neither LLaMA-Factory's nor Megatron's; dataflex_parse.parse checks them against each other."""

    # DataFlex's
    train_type: str = field(
        default="static",
        metadata={
            "help": (
                "`static`: LLaMA-Factory's own training. `dynamic_select`, `dynamic_mix`, `dynamic_reorder`, "
                "`dynamic_weight`: one role, named by `component_name` or by the role's key. `dynamic_lego`: a pipeline of "
                "stages, each with its own update schedule. `dynamic`: the roles "
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
    warmup_step: Annotated[int, Range(ge=0)] = field(
        default=0, metadata={"help": "optimizer steps on the initial data before the first update"}
    )
    update_step: Annotated[int, Range(ge=0)] = field(
        default=0,
        metadata={"help": "optimizer steps from one update to the next; >= 1 when a selector or a mixer moves"},
    )
    update_times: int = field(default=1, metadata={"help": "updates; below 0: until the end (selecting: 0 too)"})
    static_mix: bool = field(
        default=False, metadata={"help": "keep `init_mixture_proportions` for the whole run: the mixer `static`"}
    )
    train_step: Annotated[int, Range(ge=0)] = field(
        default=0,
        metadata={"help": "optimizer steps of the run; 0: `max_steps`, else the length of the schedule, else epochs"},
    )
    freeze_gate: bool = field(default=False, metadata={"help": "do not train the routers of mixture-of-experts layers"})
    early_stopping_min_delta: Annotated[float, Range(ge=0)] = field(
        default=0.0, metadata={"help": "smallest improvement that counts for `early_stopping_steps`"}
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
    init_mixture_proportions: Annotated[list[float] | None, RelativeWeights()] = field(
        default=None,
        metadata={"help": "one number for each dataset, in the order of `dataset`, taken relative to their sum"},
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
    verify: Literal["background", "full", "sizes"] = field(
        default="background",
        metadata={
            "help": (
                "when the files of a corpus are compared with the hashes in its manifest. `background`: beside the first "
                "steps, and a wrong one ends the run. `full`: before the first step. `sizes`: never, only their sizes"
            )
        },
    )
    engine: Annotated[str, EngineName()] = field(
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
    min_proportion: Annotated[float | list[float] | None, Fraction] = field(
        default=None,
        metadata={"help": "floor of a mixer's proportions: one for all datasets, or one for each"},
    )
    max_proportion: Annotated[float | list[float] | None, Fraction] = field(
        default=None,
        metadata={"help": "cap of a mixer's proportions: one for all datasets, or one for each"},
    )
    max_epochs: Annotated[float | list[float] | None, Range(gt=0)] = field(
        default=None,
        metadata={
            "help": (
                "how often a mixer may have a dataset drawn: one for all datasets, or one for each. One that has been "
                "drawn that often is not drawn any more"
            )
        },
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": (
                "folder of the reference model of `doremi`, `rho_loss` and `rho1`: a Hugging Face model, an adapter, or a "
                "checkpoint"
            )
        },
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
    weight_scope: Literal["micro_batch", "step"] = field(
        default="micro_batch",
        metadata={
            "help": (
                "whose losses a weighter compares under accumulation. `micro_batch`: one micro-batch of all ranks. `step`: "
                "the whole step, for one more forward pass"
            )
        },
    )
    loss_normalization: Literal["token", "sample"] = field(
        default="token", metadata={"help": "what each counts the same: target tokens or samples"}
    )
    on_non_finite: Literal["stop", "continue"] = field(
        default="stop", metadata={"help": "at a loss or gradient that is not finite: stop, or skip the step"}
    )
    save_on_signal: bool = field(
        default=True,
        metadata={
            "help": (
                "after SIGTERM or SIGUSR1 on any process: finish the step, write a checkpoint and end with status 143, also "
                "with `save_strategy: no`. A second signal, 5 seconds later or more, ends the program at once"
            )
        },
    )
    save_hf_checkpoints: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={
            "help": (
                "whether a checkpoint holds the whole model in Hugging Face layout too. `auto`: with `save_only_model`, "
                "`load_best_model_at_end` and `save_strategy: best`. An adapter is always in it"
            )
        },
    )
    resume_ignore: list[str] = field(
        default_factory=list,
        metadata={"help": "differences from the checkpoint to accept, such as `global_batch_size`"},
    )
    candidate_fraction: Annotated[float, Range(gt=0, le=1)] = field(
        default=1.0,
        metadata={
            "help": (
                "share of each dataset that a selector considers at an update. Every update considers "
                "another part, until all samples have had their turn"
            )
        },
    )
    score_reuse: Literal["none", "latest"] = field(
        default="none",
        metadata={
            "help": (
                "what may be chosen where `candidate_fraction` is below 1. `none`: what this update has scored. `latest`: "
                "that, and what earlier updates have scored, by the latest score of each"
            )
        },
    )
    score_batch_size: Annotated[int | None, Range(ge=1)] = field(
        default=None, metadata={"help": "samples scored at once on a rank; None: `per_device_eval_batch_size`"}
    )
    prefetch: Annotated[int, Range(ge=0)] = field(
        default=2, metadata={"help": "optimizer steps of data prepared ahead"}
    )
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard scalars"})

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.callbacks:
            module, colon, cls = name.partition(":")
            if not colon or not all(part.isidentifier() for part in [*module.split("."), cls]):
                raise ConfigError(f"callbacks: expected package.module:Class, found {name!r}")
