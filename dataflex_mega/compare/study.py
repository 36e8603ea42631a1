"""`dataflex-cli regmix STUDY.yaml`: small runs on random mixtures, a regression, and the proposed proportions."""

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
from dataflex_mega.compare.progress import ComparisonProgress
from dataflex_mega.compare.results import MACRO, OVERALL, Comparison
from dataflex_mega.compare.suite import Suite
from dataflex_mega.config.load import resolve
from dataflex_mega.config.parse import parse_config
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.files import atomic_write
from dataflex_mega.llamafactory import args as lf_args
from dataflex_mega.llamafactory.data import load_data
from dataflex_mega.llamafactory.model import load_tokenizer

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
COUNT_KEYS = ("runs", "candidates", "average")
PROPORTIONS_FILE = "proportions.json"
# Replaces the keys of the base that set proportions; None removes a key.
STATIC_KEYS = {
    **dict.fromkeys(
        ("train_type", "component_name", "static_mix", "mixture_sample_rule", "init_mixture_proportions_file")
    ),
    "mixer": "static",
}


@dataclass(frozen=True)
class RegMixStudy:
    """A checked study file."""

    base: dict[str, Any]
    output_dir: Path
    options: dict[str, Any]  # DEFAULTS, overridden by the file
    domains: list[str]

    def generator(self, stream: int) -> np.random.Generator:
        """Random numbers of a stream. 0: the mixtures of the runs; 1: the candidates."""
        return np.random.default_rng([self.options["seed"], stream])


def main(arguments: Sequence[str]) -> int:
    """0 when proportions were written from all runs; 1 when some runs are missing. Raises UserError for a mistake."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    options = command.parse_arguments(arguments)
    study = read(options.path, options.overrides)
    natural = natural_proportions(study)
    sampler = regmix.MixtureSampler(natural, (*study.options["strengths"],), study.options["temperature"])
    mixtures = sampler.sample(study.options["runs"], study.generator(0))
    plan = build_suite(study, mixtures, options.path)
    keys = command.check_runs(plan)
    missing = runner.prepare(plan, options.rerun)
    failed: dict[str, str] = {}
    if not options.collect:
        if plan.launch == "print":
            return command.print_launch_lines(plan, missing)
        failed = command.train_missing(plan, missing)
    progress = ComparisonProgress()
    comparison = results.collect(plan, partial(command.evaluate_run, keys, progress), failed)
    for line in propose_proportions(study, sampler, mixtures, comparison):
        progress.print_line(line)
    return 1 if comparison.missing else 0


def read(path: str, overrides: Sequence[str]) -> RegMixStudy:
    """A study from its file. Raises ConfigError naming the key that is unknown, missing or out of range."""
    data = suite.read_keys(path, overrides, KEYS)
    base = data.pop("base")
    options = {**DEFAULTS, **{key: value for key, value in resolve(data, path).items() if key in DEFAULTS}}
    output = resolve(data, path).get("output_dir")
    if not isinstance(output, str) or not output:
        raise ConfigError(f"{path}: output_dir: expected a folder, found {output!r}")
    for key in COUNT_KEYS:
        _check(path, key, options[key], isinstance(options[key], int) and options[key] >= 1, "a whole number >= 1")
    seed, degree, strengths = options["seed"], options["degree"], options["strengths"]
    _check(path, "seed", seed, isinstance(seed, int) and seed >= 0, "a whole number >= 0")
    _check(path, "degree", degree, degree in (1, 2), "1 or 2")
    _check(path, "average", options["average"], options["average"] <= options["candidates"], "at most candidates")
    pair = isinstance(strengths, list) and len(strengths) == 2 and all(_is_positive(s) for s in strengths)
    _check(path, "strengths", strengths, pair and strengths[0] <= strengths[1], "two numbers > 0, the smaller first")
    _check(path, "temperature", options["temperature"], _is_positive(options["temperature"]), "a number > 0")
    domains, targets = suite.parse_names(base.get("dataset")), suite.parse_names(base.get("eval_dataset"))
    if len(domains) < 2:
        raise ConfigError(f"{path}: base.dataset: at least two domains can be mixed, found {domains}")
    fewest = regmix.min_runs(len(domains))
    _check(path, "runs", options["runs"], options["runs"] >= fewest, f">= {fewest} for {len(domains)} domains")
    known = [OVERALL, MACRO, *targets]
    if options["target"] not in known:
        hint = did_you_mean(str(options["target"]), known)
        raise ConfigError(f"{path}: target: expected one of {', '.join(known)}, found {options['target']!r}{hint}")
    return RegMixStudy(base, Path(output), options, domains)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check(path: str, key: str, value: Any, holds: bool, expected: str) -> None:
    if not holds or isinstance(value, bool):
        raise ConfigError(f"{path}: {key}: expected {expected}, found {value!r}")


def natural_proportions(study: RegMixStudy) -> np.ndarray:
    """[k] `natural` of the file, otherwise the fraction of the samples in each domain. Raises ConfigError, DataError."""
    weights = study.options["natural"]
    if weights is None:
        weights = count_samples(study)
    elif not isinstance(weights, list) or len(weights) != len(study.domains) or not all(map(_is_positive, weights)):
        names = ", ".join(study.domains)
        raise ConfigError(f"natural: expected a number > 0 for each of {names}, found {weights!r}")
    proportions = np.asarray(weights, dtype=np.float64)
    return proportions / proportions.sum()


def count_samples(study: RegMixStudy) -> list[int]:
    """[k] number of samples of each domain, read in this process as training reads them."""
    config = {**resolve(dict(study.base), "base"), "mixer": "static", "output_dir": str(study.output_dir / "natural")}
    lf = parse_config(config, lf_args.argument_types()).llamafactory
    for key in ("eval_dataset", "eval_strategy", "eval_steps", "val_size"):
        lf.pop(key, None)
    parsed = lf_args.parse_arguments(lf_args.prepare_arguments(lf))
    module, template = load_tokenizer(parsed)
    return [len(domain.rows) for domain in load_data(parsed, module, template).domains]


def build_suite(study: RegMixStudy, mixtures: np.ndarray, where: str) -> Suite:
    """The small runs as a suite: one method for each mixture, one seed."""
    methods = {
        f"mix-{number:03d}": {**STATIC_KEYS, "init_mixture_proportions": [float(f"{p:.9g}") for p in mixture]}
        for number, mixture in enumerate(mixtures)
    }
    options = study.options
    common_keys = {"seeds": [options["seed"]], "launch": options["launch"], "processes": options["processes"]}
    return suite.build(
        {"base": study.base, "methods": methods, "output_dir": str(study.output_dir), **common_keys}, where
    )


def propose_proportions(
    study: RegMixStudy, sampler: regmix.MixtureSampler, mixtures: np.ndarray, comparison: Comparison
) -> list[str]:
    """Fit, propose, write proportions.json, results.csv and regmix.png -> lines for the user. Raises ConfigError."""
    row_of_method = {method: number for number, method in enumerate(comparison.suite.methods)}
    finished = mixtures[[row_of_method[result.method] for result in comparison.results]]
    losses = np.asarray([result.loss[study.options["target"]] for result in comparison.results])
    fitted = regmix.fit(finished, losses, study.options["degree"])
    candidates, average = study.options["candidates"], study.options["average"]
    best = regmix.propose(fitted, sampler, candidates, average, study.generator(1))
    record = proportions_record(study, sampler, fitted, best)
    atomic_write(study.output_dir / PROPORTIONS_FILE, json.dumps(record, indent=1))
    atomic_write(study.output_dir / "results.csv", report.as_csv(comparison))
    plot_file = plot_study(study, fitted, record)
    lines = [f"no result: {key}: {why}" for key, why in comparison.missing.items()]
    for name, before, after in zip(study.domains, sampler.natural, best, strict=True):
        lines.append(f"  {name:<24} natural {before:.4f}   proposed {after:.4f}")
    rounded = ", ".join(f"{p:.5f}" for p in best)
    return [
        *lines,
        f"loss ({study.options['target']}): predicted {record['predicted_loss']:.4f}, at the natural proportions "
        f"{record['predicted_loss_natural']:.4f}, lowest of {len(losses)} runs {losses.min():.4f}",
        f"leave-one-out: error {fitted.error:.4f} nats, rank correlation {fitted.correlation:.2f}",
        f"init_mixture_proportions: [{rounded}]",
        f"init_mixture_proportions_file: {study.output_dir / PROPORTIONS_FILE}",
        f"written: {study.output_dir / PROPORTIONS_FILE}, {study.output_dir / 'results.csv'}, {plot_file}",
    ]


def proportions_record(
    study: RegMixStudy, sampler: regmix.MixtureSampler, fitted: regmix.RegMixFit, best: np.ndarray
) -> Mapping[str, Any]:
    """The content of proportions.json: what `init_mixture_proportions_file` reads, and the quality of the fit."""
    return {
        "description": f"RegMix over {len(fitted.losses)} runs; lowest predicted {study.options['target']} loss",
        "domain_names": study.domains,
        "average_weights": best.tolist(),
        "natural": sampler.natural.tolist(),
        "target": study.options["target"],
        "predicted_loss": float(fitted.predict(best[None])[0]),
        "predicted_loss_natural": float(fitted.predict(sampler.natural[None])[0]),
        "lowest_measured_loss": float(fitted.losses.min()),
        "leave_one_out_error": fitted.error,
        "leave_one_out_rank_correlation": fitted.correlation,
    }


def plot_study(study: RegMixStudy, fitted: regmix.RegMixFit, record: Mapping[str, Any]) -> Path:
    """Write regmix.png: leave-one-out predictions over measured losses, and the proportions -> its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(fitted.losses, fitted.leave_one_out, "o")
    ends = [fitted.losses.min(), fitted.losses.max()]
    left.plot(ends, ends, color="gray", linewidth=1)
    left.set(xlabel="measured loss", ylabel="predicted without this run", title="Leave-one-out")
    positions = np.arange(len(study.domains))
    right.bar(positions - 0.2, record["natural"], width=0.4, label="natural")
    right.bar(positions + 0.2, record["average_weights"], width=0.4, label="proposed")
    right.set_xticks(positions, study.domains, rotation=30, ha="right")
    right.set(ylabel="proportion", title="Mixture")
    right.legend()
    target = study.output_dir / "regmix.png"
    figure.savefig(target, dpi=120)
    return target
