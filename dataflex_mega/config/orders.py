"""What a `reorder` specification says beside its pattern: when samples are scored, by what, and which end comes first.

DataFlex's layout, in which `pattern` names the algorithm and `pattern_params` hold its parameters, and the short one of the
other roles, in which `name` does and the parameters stand beside it:

    reorder: {name: folding, layers: 3, kind: dynamic}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dataflex_mega.config.components import Spec
from dataflex_mega.config.values import fit
from dataflex_mega.errors import ConfigError, did_you_mean

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
FILES = (".npy", ".json", ".jsonl")


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
    batch_size: int | None = field(default=None, metadata={"help": "samples scored at once on a rank"})
    num_workers: int = field(default=0, metadata={"help": "DataFlex's; not used"})
    max_samples: int | None = field(
        default=None, metadata={"help": "score so many, drawn at random each time; the others take the median"}
    )
    seed: int = field(default=42, metadata={"help": "of that draw"})


@dataclass(frozen=True)
class OrderArguments:
    """The part of a `reorder` specification that all patterns share."""

    kind: Literal["static", "dynamic"] = field(
        default="dynamic",
        metadata={"help": "`static`: scored once, before the first step. `dynamic`: scored anew at every update"},
    )
    polarity: str | None = field(
        default=None,
        metadata={
            "help": (
                "`higher_later`: high scores at the end of a pass; `higher_earlier`: at its beginning. None, as in "
                "DataFlex: the first for `static`, the second for `dynamic`"
            )
        },
    )
    ascending: bool = field(default=True, metadata={"help": "false turns the polarity around"})
    window_size: int = field(default=0, metadata={"help": "above 1: blocks of so many places are shuffled"})
    seed: int = field(default=42, metadata={"help": "of `shuffle`, `segment` and blocks"})
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
    reorder_every: int = field(default=1, metadata={"help": "score at every k-th update only"})
    consume_once: bool = field(default=True, metadata={"help": "false: every update begins a pass anew"})
    apply_at: Literal["raw", "index"] = field(
        default="raw", metadata={"help": "whose order `score_path` follows: the rows' or the tokenized samples'"}
    )

    def __post_init__(self) -> None:
        for key, least in (("window_size", 0), ("reorder_every", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"reorder.{key}: must be >= {least}, found {getattr(self, key)}")
        known = ("higher_later", "higher_earlier", *POLARITY)
        if self.polarity is not None and self.polarity not in known:
            near = did_you_mean(self.polarity, known)
            raise ConfigError(f"reorder.polarity: expected one of {', '.join(known)}, found {self.polarity!r}{near}")
        self._check_source(self.scores)

    @property
    def source(self) -> str:
        """The score source, its default filled in."""
        return self.score_source or ("precomputed" if self.kind == "static" else "model_loss")

    @property
    def low_first(self) -> bool:
        """Whether sorted means from low to high scores."""
        given = self.polarity or ("higher_later" if self.kind == "static" else "higher_earlier")
        return self.ascending == (POLARITY.get(given, given) == "higher_later")

    @property
    def scores(self) -> ScoreParams:
        """score_params, checked."""
        allowed, given = SCORE_PARAMS[self.source], dict(self.score_params or {})
        types = {f.name: str(f.type) for f in fields(ScoreParams)}
        for key in given:
            if key not in allowed:
                hint = f"{did_you_mean(str(key), allowed)}; {self.source} has {', '.join(allowed)}"
                raise ConfigError(f"reorder.score_params.{key}: unknown parameter{hint}")
        return ScoreParams(**{k: fit(f"reorder.score_params.{k}", v, types[k]) for k, v in given.items()})

    def identity(self) -> dict[str, Any]:
        """What decides the order, all defaults filled in; where scores lie and how many are measured at once does not."""
        read = {key: getattr(self.scores, key) for key in SCORE_PARAMS[self.source] if key not in FREE_PARAMS}
        kept = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("polarity", "ascending", "apply_at")
        }
        return {**kept, "low_first": self.low_first, "score_source": self.source, "score_params": read}

    def _check_source(self, found: ScoreParams) -> None:
        where = "reorder.score_params"
        if self.source == "cached_selection" and found.cache_path is None:
            raise ConfigError(f"{where}.cache_path: missing; expected a step_N.json of a selection")
        if self.source == "selector" and found.selector is None:
            raise ConfigError(f"{where}.selector: missing; expected the selector whose scores count")
        if found.score_path is not None and not found.score_path.endswith(FILES):
            raise ConfigError(f"{where}.score_path: expected {', '.join(FILES)}, found {found.score_path}")
        for key, least in (("batch_size", 1), ("max_samples", 1), ("seed", 0)):
            if getattr(found, key) is not None and getattr(found, key) < least:
                raise ConfigError(f"{where}.{key}: must be >= {least}, found {getattr(found, key)}")


def read(spec: Spec) -> tuple[Spec, OrderArguments]:
    """A flat specification -> (the pattern with its parameters, the rest). Raises ConfigError naming the key."""
    given = dict(spec)
    name = given.pop("name")
    name = given.pop("pattern", name)
    inner = given.pop("pattern_params", None) or {}
    if not isinstance(inner, Mapping):
        raise ConfigError(f"reorder.pattern_params: expected a mapping, found {inner!r}")
    types = {f.name: str(f.type) for f in fields(OrderArguments)}
    options = {key: fit(f"reorder.{key}", given.pop(key), types[key]) for key in list(given) if key in types}
    twice = sorted(set(given) & set(inner))
    if twice:
        raise ConfigError(f"reorder.{twice[0]}: given in pattern_params and beside it; drop one")
    pattern: Spec = {PARAMETERS.get(str(key), str(key)): value for key, value in {**given, **inner}.items()}
    _refuse_unknown(str(name), pattern, types)
    return {"name": name, **pattern}, OrderArguments(**options)


def _refuse_unknown(name: str, pattern: Spec, options: Mapping[str, str]) -> None:
    from dataflex_mega.registry import parameters  # here, since it imports torch

    known = parameters("reorder", name)
    for key in pattern:
        near = did_you_mean(str(key), [*known, *options])
        if key not in known and near:
            raise ConfigError(f"reorder.{name}.{key}: unknown parameter{near}")
