"""Reads a suite file into its training runs, each with its complete configuration.

A method is a mapping of keys that change the base, or a list of phases: trainings in sequence, each with a name under
`phase`. A phase may read the folder of an earlier one as `${name.output_dir}`. The last phase is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataflex_mega.config.load import read_mapping, resolve
from dataflex_mega.data import manifest
from dataflex_mega.errors import ConfigError, did_you_mean

KEYS = ("base", "methods", "seeds", "output_dir", "launch", "processes")
LAUNCHES = ("run", "print")
STEP_TIMER = "dataflex_mega.compare.step_timer:StepTimer"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PHASE_REFERENCE = re.compile(r"\$\{([A-Za-z0-9_-][A-Za-z0-9_.-]*)\.output_dir\}")
# Keys that compare sets itself, and keys that would make a run stop early or start over.
RESERVED_KEYS = {
    "seed": "the suite's seeds are used",
    "output_dir": "the suite's output_dir is used",
    "overwrite_output_dir": "a run that was stopped continues; --rerun starts one over",
    "resume_from_checkpoint": "a run that was stopped continues by itself",
    "early_stopping_steps": "all methods train for the same number of steps",
}


@dataclass(frozen=True)
class TrainingRun:
    """One training run of a suite."""

    method: str
    seed: int
    phase: str  # "" for a method of one phase
    is_final: bool  # the phase that is compared
    folder: Path  # its output_dir
    config: dict[str, Any]  # complete, all references resolved
    needs_earlier_phase: bool  # it reads files that an earlier phase writes

    @property
    def key(self) -> str:
        """`odm/seed-1`, or `doremi/seed-1/proxy`: the name in messages and the folder below the suite's output_dir."""
        return "/".join(part for part in (self.method, f"seed-{self.seed}", self.phase) if part)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this run."""
        return num_steps_of(self.config)

    def sibling_file(self, suffix: str) -> Path:
        """A file next to the run's folder: `.yaml` is its configuration, `.log` its output."""
        return self.folder.parent / (self.folder.name + suffix)


@dataclass(frozen=True)
class Suite:
    """All runs of a comparison. The first method is the baseline."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    output_dir: Path
    launch: str  # "run" or "print"
    processes: int
    runs: tuple[TrainingRun, ...]  # in the order in which they are trained

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.methods[0]

    def phases_of(self, method: str, seed: int) -> list[TrainingRun]:
        """The phases of one method with one seed, in order."""
        return [run for run in self.runs if (run.method, run.seed) == (method, seed)]


def read(path: str, overrides: Sequence[str] = ()) -> Suite:
    """A suite from its file. `overrides`: `key=value`, where `base.KEY=value` changes a key of the base.

    Raises ConfigError naming file and key for what is unknown, missing, of a wrong type or not comparable.
    """
    return build(read_keys(path, overrides, KEYS), path)


def read_keys(path: str, overrides: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """The top-level keys of a file with `overrides`, its `base` read too. Raises ConfigError for a key not in `known`."""
    data = read_mapping(path)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"override {override!r}: expected key=value, such as processes=2 or base.max_steps=100")
        refuse_unknown(f"override {override!r}", [key.partition(".")[0]], known)
    refuse_unknown(path, data, known)
    data["base"] = _base(data, path)
    try:
        changed = OmegaConf.merge(OmegaConf.create(data), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(changed, resolve=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def refuse_unknown(where: str, keys: Any, known: Sequence[str]) -> None:
    """Raises ConfigError for the first of `keys` that is not `known`."""
    for key in keys:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}; {', '.join(known)}")


def _base(data: Mapping[str, Any], path: str) -> dict[str, Any]:
    base = data.get("base")
    if isinstance(base, str):
        return read_mapping(base, key=f"{path}: base")
    if not isinstance(base, dict):
        raise ConfigError(f"{path}: base: expected a training YAML's path or its keys, found {base!r}")
    return dict(base)


def build(data: Mapping[str, Any], where: str) -> Suite:
    """A suite from its keys, `base` a mapping. `where` names the file in messages. Raises ConfigError."""
    refuse_unknown(where, data, KEYS)
    for key in ("base", "methods", "seeds", "output_dir"):
        if data.get(key) is None:
            raise ConfigError(f"{where}: {key} is missing; {', '.join(KEYS)}")
    simple = resolve({key: data[key] for key in KEYS[2:] if key in data}, where)
    seeds = _seeds(simple["seeds"], where)
    output = simple["output_dir"]
    if not isinstance(output, str) or not output:
        raise ConfigError(f"{where}: output_dir: expected a folder, found {output!r}")
    launch = simple.get("launch", "run")
    if launch not in LAUNCHES:
        raise ConfigError(f"{where}: launch: expected run or print, found {launch!r}")
    processes = simple.get("processes", 1)
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ConfigError(f"{where}: processes: expected a whole number >= 1, found {processes!r}")
    methods = {name: _phases(name, value, where) for name, value in _methods(data["methods"], where).items()}
    runs = [
        run
        for seed in seeds  # seed by seed, so that a suite that is stopped early compares all methods
        for name, phases in methods.items()
        for run in _runs(data["base"], (name, seed), phases, Path(output), where)
    ]
    suite = Suite(tuple(methods), seeds, Path(output), launch, processes, tuple(runs))
    check_budget(suite, where)
    return suite


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    seeds = value if isinstance(value, list) else [value]
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) != len(seeds):
        raise ConfigError(f"{where}: seeds: expected different whole numbers >= 0, found {value!r}")
    return tuple(seeds)


def _methods(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(
            f"{where}: methods: expected a name for each method with the keys it changes, found {value!r}"
        )
    for name in value:
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise ConfigError(f"{where}: methods: {name!r} cannot be a folder's name; letters, digits, _ . -")
    return value


def _phases(method: str, value: Any, where: str) -> list[tuple[str, dict[str, Any]]]:
    """[(phase name, keys that it changes)]."""
    at = f"{where}: methods.{method}"
    if value is None or isinstance(value, dict):
        phases = [("", dict(value or {}))]
    elif isinstance(value, list) and value and all(isinstance(phase, dict) for phase in value):
        phases = [(str(phase.get("phase", "")), {k: v for k, v in phase.items() if k != "phase"}) for phase in value]
        names = [name for name, _ in phases]
        if not all(NAME_PATTERN.fullmatch(name) for name in names) or len(set(names)) != len(names):
            raise ConfigError(f"{at}: every phase needs a name of its own under `phase`, found {names}")
    else:
        raise ConfigError(f"{at}: expected keys that change the base, or a list of phases, found {value!r}")
    for name, keys in phases:
        for key in sorted(set(keys) & set(RESERVED_KEYS)):
            raise ConfigError(f"{at}{'.' * bool(name)}{name}: {key} cannot be set here; {RESERVED_KEYS[key]}")
    return phases


def _runs(
    base: Mapping[str, Any],
    method_and_seed: tuple[str, int],
    phases: list[tuple[str, dict[str, Any]]],
    output: Path,
    where: str,
) -> Iterator[TrainingRun]:
    method, seed = method_and_seed
    folders: dict[str, str] = {}
    for number, (phase, changes) in enumerate(phases):
        at = f"{where}: methods.{method}{'.' * bool(phase)}{phase}"
        folder = output / method / f"seed-{seed}" / phase
        filled = _fill({**base, **changes}, folders, at)
        config = {key: value for key, value in resolve(filled, at).items() if value is not None}
        for key in ("overwrite_output_dir", "resume_from_checkpoint", "early_stopping_steps"):
            if config.get(key):
                raise ConfigError(f"{at}: base.{key} cannot be set here; {RESERVED_KEYS[key]}")
        if config.get("eval_corpus_dir") and not config.get("eval_dataset"):
            config["eval_dataset"] = list(manifest.read(config["eval_corpus_dir"], f"{at}: eval_corpus_dir").names)
        config.update(seed=seed, output_dir=str(folder), callbacks=[*(config.get("callbacks") or []), STEP_TIMER])
        yield TrainingRun(method, seed, phase, number == len(phases) - 1, folder, config, filled != {**base, **changes})
        folders[phase] = str(folder)


def _fill(value: Any, folders: Mapping[str, str], at: str) -> Any:
    """`value` with every `${phase.output_dir}` replaced. Raises ConfigError for a phase that is not an earlier one."""
    if isinstance(value, dict):
        return {key: _fill(inner, folders, at) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, folders, at) for inner in value]
    if not isinstance(value, str):
        return value
    for name in PHASE_REFERENCE.findall(value):
        if name not in folders:
            earlier = f"earlier phases: {', '.join(folders)}" if folders else "there is no earlier phase"
            raise ConfigError(
                f"{at}: ${{{name}.output_dir}} names no earlier phase{did_you_mean(name, folders)}; {earlier}"
            )
    return PHASE_REFERENCE.sub(lambda match: folders[match.group(1)], value)


# -- budgets -----------------------------------------------------------------------------------------------------------


def num_steps_of(config: Mapping[str, Any]) -> int:
    """Optimizer steps that train_step or max_steps set, 0 when neither does."""
    for key in ("train_step", "max_steps"):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def check_budget(suite: Suite, where: str) -> None:
    """Raises ConfigError unless the final runs train equally long, on batches of one size, and have held-out data."""
    first = budget(suite.phases_of(suite.baseline, suite.seeds[0])[-1])
    for method in suite.methods:
        for run in suite.phases_of(method, suite.seeds[0]):
            if run.num_steps == 0:
                raise ConfigError(f"{where}: methods.{method}: max_steps (or train_step) must say how long it trains")
        final = suite.phases_of(method, suite.seeds[0])[-1]
        if not parse_names(final.config.get("eval_dataset")):
            raise ConfigError(f"{where}: methods.{method}: eval_dataset is missing; perplexity is measured on it")
        for key, value in budget(final).items():
            if value != first[key]:
                raise ConfigError(
                    f"{where}: methods.{method}: {key} is {value!r}, for {suite.baseline} it is {first[key]!r}; "
                    "all methods need the same budget and held-out data"
                )


def budget(run: TrainingRun) -> dict[str, Any]:
    """The keys that set how long a run trains and on which data it is evaluated."""
    config = run.config
    sizes = config.get("per_device_train_batch_size", 8), config.get("gradient_accumulation_steps", 1)
    whole = all(isinstance(size, int) for size in sizes)  # otherwise the run's own check reports the error
    return {
        "max_steps": run.num_steps,
        "per_device_train_batch_size x gradient_accumulation_steps": sizes[0] * sizes[1] if whole else list(sizes),
        "cutoff_len": config.get("cutoff_len"),
        "eval_dataset": parse_names(config.get("eval_dataset")),
    }


def parse_names(value: Any) -> list[str]:
    """Split `a, b` into a list of names; a list passes through."""
    parts = value.split(",") if isinstance(value, str) else value or []
    return [str(part).strip() for part in parts]
