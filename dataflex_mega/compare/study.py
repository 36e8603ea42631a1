"""`dataflex-cli regmix STUDY.yaml`: small runs on drawn mixtures, a regression, proportions to train with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dataflex_mega.compare import command, regmix, report, results, runner, suite
from dataflex_mega.compare.progress import Board
from dataflex_mega.compare.results import MACRO, OVERALL, Comparison
from dataflex_mega.compare.suite import Suite
from dataflex_mega.config.load import resolve
from dataflex_mega.errors import ConfigError, did_you_mean

HELP = """usage: dataflex-cli regmix STUDY.yaml [--collect] [--rerun NAME ...] [key=value ...]

Trains small runs on mixtures drawn around the natural one, fits their held-out loss as a function of the proportions,
and writes the proportions with the lowest predicted loss into output_dir/proportions.json, for
`init_mixture_proportions_file`. Given again, it trains what is missing only.

  base:         a small training YAML, or its keys; dataset names the domains, eval_dataset what is measured
  output_dir:   runs go to mix-000/seed-N below it, and so on
  runs:         how many mixtures; 32. Twice the number of pairs of domains is a good start
  seed:         of the mixtures and of the training; 1
  target:       overall, macro, or one of eval_dataset; overall
  natural:      the proportions that mixtures are drawn around; those of the numbers of samples
  strengths:    [0.1, 5.0], from far from natural to near
  temperature:  0.5, the power of the natural proportions; below 1 lifts small domains
  degree:       of the regression, 1 or 2; 2
  candidates:   100000 mixtures are predicted
  average:      128 best of them are averaged
  processes, launch   as for compare

  --collect, --rerun NAME, key=value   as for compare"""

DEFAULTS: dict[str, Any] = {
    "runs": 32, "seed": 1, "target": OVERALL, "natural": None, "strengths": [0.1, 5.0], "temperature": 0.5,
    "degree": 2, "candidates": 100_000, "average": 128, "processes": 1, "launch": "run",
}  # fmt: skip
KEYS = ("base", "output_dir", *DEFAULTS)
COUNTS = ("runs", "candidates", "average")
PROPORTIONS_FILE = "proportions.json"
# Keys of the base that would move or fix proportions otherwise; None takes a key out.
STATIC = {
    **dict.fromkeys(
        ("train_type", "component_name", "static_mix", "mixture_sample_rule", "init_mixture_proportions_file")
    ),
    "mixer": "static",
}


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    base: dict[str, Any]
    output: Path
    options: dict[str, Any]  # DEFAULTS with what was given
    domains: list[str]

    def random(self, stream: int) -> np.random.Generator:
        """0: the mixtures of the runs; 1: the candidates."""
        return np.random.default_rng([self.options["seed"], stream])


def main(arguments: Sequence[str]) -> int:
    """0 when proportions were written from all runs; 1 when some runs are missing. Raises UserError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    options = command.parse(arguments)
    study = read(options.path, options.overrides)
    natural = natural_proportions(study)
    draw = regmix.Draw(natural, (*study.options["strengths"],), study.options["temperature"])
    mixtures = draw.mixtures(study.options["runs"], study.random(0))
    chosen = as_suite(study, mixtures, options.path)
    keys = command.check(chosen)
    missing = runner.prepare(chosen, options.rerun)
    failed: dict[str, str] = {}
    if not options.collect:
        if chosen.launch == "print":
            return command.print_lines(chosen, missing)
        failed = command.train(chosen, missing)
    board = Board()
    found = results.collect(chosen, partial(command.measure, keys, board), failed)
    for line in conclude(study, draw, mixtures, found):
        board.note(line)
    return 1 if found.missing else 0


def read(path: str, overrides: Sequence[str]) -> Study:
    """A study from its file. Raises ConfigError naming the key that is unknown, missing or out of range."""
    given = suite.read_keys(path, overrides, KEYS)
    base = given.pop("base")
    options = {**DEFAULTS, **{key: value for key, value in resolve(given, path).items() if key in DEFAULTS}}
    output = resolve(given, path).get("output_dir")
    if not isinstance(output, str) or not output:
        raise ConfigError(f"{path}: output_dir: expected a folder, found {output!r}")
    for key in COUNTS:
        _check(path, key, options[key], isinstance(options[key], int) and options[key] >= 1, "a whole number >= 1")
    seed, degree, strengths = options["seed"], options["degree"], options["strengths"]
    _check(path, "seed", seed, isinstance(seed, int) and seed >= 0, "a whole number >= 0")
    _check(path, "degree", degree, degree in (1, 2), "1 or 2")
    _check(path, "average", options["average"], options["average"] <= options["candidates"], "at most candidates")
    pair = isinstance(strengths, list) and len(strengths) == 2 and all(_is_positive(s) for s in strengths)
    _check(path, "strengths", strengths, pair and strengths[0] <= strengths[1], "two numbers > 0, the smaller first")
    _check(path, "temperature", options["temperature"], _is_positive(options["temperature"]), "a number > 0")
    domains, targets = suite.listed(base.get("dataset")), suite.listed(base.get("eval_dataset"))
    if len(domains) < 2:
        raise ConfigError(f"{path}: base.dataset: at least two domains can be mixed, found {domains}")
    least = regmix.least_runs(len(domains))
    _check(path, "runs", options["runs"], options["runs"] >= least, f">= {least} for {len(domains)} domains")
    known = [OVERALL, MACRO, *targets]
    if options["target"] not in known:
        hint = did_you_mean(str(options["target"]), known)
        raise ConfigError(f"{path}: target: expected one of {', '.join(known)}, found {options['target']!r}{hint}")
    return Study(base, Path(output), options, domains)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check(path: str, key: str, value: Any, holds: bool, wanted: str) -> None:
    if not holds or isinstance(value, bool):
        raise ConfigError(f"{path}: {key}: expected {wanted}, found {value!r}")


def natural_proportions(study: Study) -> np.ndarray:
    """[k] `natural` of the file, else each domain's share of the samples. Raises ConfigError, DataError."""
    given = study.options["natural"]
    if given is None:
        given = sample_counts(study)
    elif not isinstance(given, list) or len(given) != len(study.domains) or not all(_is_positive(q) for q in given):
        names = ", ".join(study.domains)
        raise ConfigError(f"natural: expected a number > 0 for each of {names}, found {given!r}")
    shares = np.asarray(given, dtype=np.float64)
    return shares / shares.sum()


def sample_counts(study: Study) -> list[int]:
    """[k] samples of each domain as training reads them, in this process."""
    from dataflex_mega.config.parse import split
    from dataflex_mega.llamafactory import args as lf_args
    from dataflex_mega.llamafactory.data import load_data
    from dataflex_mega.llamafactory.model import load_tokenizer

    config = {**resolve(dict(study.base), "base"), "mixer": "static", "output_dir": str(study.output / "natural")}
    lf = split(config, lf_args.keys()).lf
    for key in ("eval_dataset", "eval_strategy", "eval_steps", "val_size"):
        lf.pop(key, None)
    parsed = lf_args.parse(lf_args.prepare(lf))
    module, template = load_tokenizer(parsed)
    return [len(domain.rows) for domain in load_data(parsed, module, template).domains]


def as_suite(study: Study, mixtures: np.ndarray, where: str) -> Suite:
    """The small runs as a suite: one method for each mixture, one seed."""
    methods = {
        f"mix-{number:03d}": {**STATIC, "init_mixture_proportions": [float(f"{p:.9g}") for p in mixture]}
        for number, mixture in enumerate(mixtures)
    }
    options = study.options
    same = {"seeds": [options["seed"]], "launch": options["launch"], "processes": options["processes"]}
    return suite.build({"base": study.base, "methods": methods, "output_dir": str(study.output), **same}, where)


def conclude(study: Study, draw: regmix.Draw, mixtures: np.ndarray, found: Comparison) -> list[str]:
    """Fit, propose, write proportions.json, results.csv and regmix.png -> lines for the user. Raises ConfigError."""
    order = {method: number for number, method in enumerate(found.suite.methods)}
    tried = mixtures[[order[result.method] for result in found.results]]
    losses = np.asarray([result.loss[study.options["target"]] for result in found.results])
    fitted = regmix.fit(tried, losses, study.options["degree"])
    candidates, average = study.options["candidates"], study.options["average"]
    best = regmix.propose(fitted, draw, candidates, average, study.random(1))
    record = describe(study, draw, fitted, best)
    runner.write_beside(study.output / PROPORTIONS_FILE, json.dumps(record, indent=1))
    runner.write_beside(study.output / "results.csv", report.as_csv(found))
    picture = plot(study, fitted, record)
    lines = [f"no result: {key}: {why}" for key, why in found.missing.items()]
    for name, before, after in zip(study.domains, draw.natural, best, strict=True):
        lines.append(f"  {name:<24} natural {before:.4f}   proposed {after:.4f}")
    rounded = ", ".join(f"{p:.5f}" for p in best)
    return [
        *lines,
        f"loss ({study.options['target']}): predicted {record['predicted_loss']:.4f}, at the natural proportions "
        f"{record['predicted_loss_natural']:.4f}, lowest of {len(losses)} runs {losses.min():.4f}",
        f"leave-one-out: error {fitted.error:.4f} nats, rank correlation {fitted.correlation:.2f}",
        f"init_mixture_proportions: [{rounded}]",
        f"init_mixture_proportions_file: {study.output / PROPORTIONS_FILE}",
        f"written: {study.output / PROPORTIONS_FILE}, {study.output / 'results.csv'}, {picture}",
    ]


def describe(study: Study, draw: regmix.Draw, fitted: regmix.Fit, best: np.ndarray) -> Mapping[str, Any]:
    """proportions.json: what `init_mixture_proportions_file` reads, and how it came about."""
    return {
        "description": f"RegMix over {len(fitted.measured)} runs; lowest predicted {study.options['target']} loss",
        "domain_names": study.domains,
        "average_weights": best.tolist(),
        "natural": draw.natural.tolist(),
        "target": study.options["target"],
        "predicted_loss": float(fitted.predict(best[None])[0]),
        "predicted_loss_natural": float(fitted.predict(draw.natural[None])[0]),
        "lowest_measured_loss": float(fitted.measured.min()),
        "leave_one_out_error": fitted.error,
        "leave_one_out_rank_correlation": fitted.correlation,
    }


def plot(study: Study, fitted: regmix.Fit, record: Mapping[str, Any]) -> Path:
    """regmix.png: leave-one-out predictions over losses, and the proportions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(fitted.measured, fitted.held_out, "o")
    ends = [fitted.measured.min(), fitted.measured.max()]
    left.plot(ends, ends, color="gray", linewidth=1)
    left.set(xlabel="measured loss", ylabel="predicted without this run", title="Leave-one-out")
    places = np.arange(len(study.domains))
    right.bar(places - 0.2, record["natural"], width=0.4, label="natural")
    right.bar(places + 0.2, record["average_weights"], width=0.4, label="proposed")
    right.set_xticks(places, study.domains, rotation=30, ha="right")
    right.set(ylabel="proportion", title="Mixture")
    right.legend()
    target = study.output / "regmix.png"
    figure.savefig(target, dpi=120)
    return target
