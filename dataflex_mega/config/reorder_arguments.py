"""What a `reorder` specification says beside its pattern: when samples are scored, by what, and which end comes first.

DataFlex's layout, in which `pattern` names the algorithm and `pattern_params` hold its parameters, and the short one of the
other roles, in which `name` does and the parameters stand beside it:

    reorder: {name: folding, layers: 3, kind: dynamic}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from dataflex_mega.config.component_parameters import Spec
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.schema.coercion import coerce
from dataflex_mega.schema.constraints import Range, check_fields, field_hints

Polarity = Literal["higher_later", "higher_earlier", "higher_is_better", "lower_is_better"]
POLARITY = {"higher_is_better": "higher_later", "lower_is_better": "higher_earlier"}
PARAMETERS = {"folding_layer": "layers", "zigzag_layer": "layers"}
# score_source -> what score_params may say.
SCORE_PARAMS: dict[str, tuple[str, ...]] = {
    "precomputed": ("score_field", "score_path"),
    "cached_selection": ("cache_path", "metric_key", "fill_value"),
    "model_loss": ("batch_size", "num_workers", "max_samples", "seed"),
    "selector": ("selector", "batch_size", "num_workers", "max_samples", "seed"),
}
FREE_PARAMS = ("score_path", "cache_path", "batch_size", "num_workers")
SCORE_FILE_SUFFIXES = (".npy", ".json", ".jsonl")


@dataclass(frozen=True)
class ScoreParams:
    """Where scores come from; which of them a source reads is in SCORE_PARAMS."""

    score_field: str = field(
        default="score", metadata={"help": "column of the raw rows, or key of a .json/.jsonl file"}
    )
    score_path: str | None = field(
        default=None, metadata={"help": "a .npy, .json or .jsonl file with a score for each sample, in their order"}
    )
    cache_path: str | None = field(default=None, metadata={"help": "a `step_N.json` that a selection has written"})
    metric_key: str = field(default="loss", metadata={"help": "which of its metrics"})
    fill_value: float = field(default=0.0, metadata={"help": "the score of samples that are not in it"})
    selector: str | dict[str, Any] | None = field(
        default=None, metadata={"help": "a selector, as under the key `selector`, whose scores count"}
    )
    batch_size: Annotated[int | None, Range(ge=1)] = field(
        default=None, metadata={"help": "samples scored at once on a rank"}
    )
    num_workers: int = field(default=0, metadata={"help": "DataFlex's; not used"})
    max_samples: Annotated[int | None, Range(ge=1)] = field(
        default=None, metadata={"help": "score so many, drawn at random each time; the others take the median"}
    )
    seed: Annotated[int, Range(ge=0)] = field(default=42, metadata={"help": "of that draw"})


@dataclass(frozen=True)
class ReorderArguments:
    """The part of a `reorder` specification that all patterns share."""

    kind: Literal["static", "dynamic"] = field(
        default="dynamic",
        metadata={"help": "`static`: scored once, before the first step. `dynamic`: scored anew at every update"},
    )
    polarity: Polarity | None = field(
        default=None,
        metadata={
            "help": (
                "`higher_later`: high scores at the end of a pass; `higher_earlier`: at its beginning. None, as in "
                "DataFlex: the first for `static`, the second for `dynamic`"
            )
        },
    )
    ascending: bool = field(default=True, metadata={"help": "false turns the polarity around"})
    window_size: Annotated[int, Range(ge=0)] = field(
        default=0, metadata={"help": "above 1: blocks of so many places are shuffled"}
    )
    seed: Annotated[int, Range(ge=0)] = field(default=42, metadata={"help": "of `shuffle`, `segment` and blocks"})
    score_source: Literal["precomputed", "cached_selection", "model_loss", "selector"] | None = field(
        default=None,
        metadata={
            "help": (
                "`precomputed`, `cached_selection`: from a file. `model_loss`: the loss of the model that is trained. "
                "`selector`: what a selector scores. None: `precomputed` for `static`, `model_loss` for `dynamic`"
            )
        },
    )
    score_params: dict[str, Any] | None = field(default=None, metadata={"help": "see below"})
    reorder_every: Annotated[int, Range(ge=1)] = field(default=1, metadata={"help": "score at every k-th update only"})
    consume_once: bool = field(default=True, metadata={"help": "false: every update begins a pass anew"})
    apply_at: Literal["raw", "index"] = field(
        default="raw", metadata={"help": "whose order `score_path` follows: the rows' or the tokenized samples'"}
    )

    scores: ScoreParams = field(init=False, repr=False, compare=False)  # score_params, checked

    def __post_init__(self) -> None:
        check_fields(self, "reorder.")
        object.__setattr__(self, "scores", self._parse_scores())

    @property
    def resolved_source(self) -> str:
        """The score source, its default filled in."""
        return self.score_source or ("precomputed" if self.kind == "static" else "model_loss")

    @property
    def low_first(self) -> bool:
        """Whether sorted means from low to high scores."""
        given = self.polarity or ("higher_later" if self.kind == "static" else "higher_earlier")
        return self.ascending == (POLARITY.get(given, given) == "higher_later")

    def identity(self) -> dict[str, Any]:
        """What decides the order, all defaults filled in; where scores lie and how many are measured at once does not."""
        read = {key: getattr(self.scores, key) for key in SCORE_PARAMS[self.resolved_source] if key not in FREE_PARAMS}
        skipped = ("polarity", "ascending", "apply_at", "scores")
        decisive = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {**decisive, "low_first": self.low_first, "score_source": self.resolved_source, "score_params": read}

    def _parse_scores(self) -> ScoreParams:
        where, allowed, given = (
            "reorder.score_params",
            SCORE_PARAMS[self.resolved_source],
            dict(self.score_params or {}),
        )
        for key in given:
            if key not in allowed:
                hint = f"{did_you_mean(str(key), allowed)}; {self.resolved_source} has {', '.join(allowed)}"
                raise ConfigError(f"{where}.{key}: unknown parameter{hint}")
        hints = field_hints(ScoreParams)
        scores = ScoreParams(**{key: coerce(f"{where}.{key}", value, hints[key]) for key, value in given.items()})
        if self.resolved_source == "cached_selection" and scores.cache_path is None:
            raise ConfigError(f"{where}.cache_path: missing; expected a step_N.json of a selection")
        if self.resolved_source == "selector" and scores.selector is None:
            raise ConfigError(f"{where}.selector: missing; expected the selector whose scores count")
        if scores.score_path is not None and not scores.score_path.endswith(SCORE_FILE_SUFFIXES):
            raise ConfigError(
                f"{where}.score_path: expected {', '.join(SCORE_FILE_SUFFIXES)}, found {scores.score_path}"
            )
        return scores


def read_reorder(spec: Spec) -> tuple[Spec, ReorderArguments]:
    """A flat specification -> (the pattern with its parameters, the rest). Raises ConfigError naming the key."""
    given = dict(spec)
    name = given.pop("name")
    name = given.pop("pattern", name)
    inner = given.pop("pattern_params", None) or {}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"reorder.pattern_params: expected a mapping, found {inner!r}")
    hints = {f.name: field_hints(ReorderArguments)[f.name] for f in fields(ReorderArguments) if f.init}
    options = {key: coerce(f"reorder.{key}", given.pop(key), hints[key]) for key in list(given) if key in hints}
    twice = sorted(set(given) & set(inner))
    if twice:
        raise ConfigError(f"reorder.{twice[0]}: given in pattern_params and beside it; drop one")
    pattern: Spec = {PARAMETERS.get(str(key), str(key)): value for key, value in {**given, **inner}.items()}
    _refuse_unknown(str(name), pattern, hints)
    return {"name": name, **pattern}, ReorderArguments(**options)


def _refuse_unknown(name: str, pattern: Spec, options: Mapping[str, Any]) -> None:
    from dataflex_mega.registry import get_parameters  # here, since it imports torch

    known = get_parameters("reorder", name)
    for key in pattern:
        near = did_you_mean(str(key), [*known, *options])
        if key not in known and near:
            raise ConfigError(f"reorder.{name}.{key}: unknown parameter{near}")
