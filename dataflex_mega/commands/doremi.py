"""DoReMi's three runs and what each passes to the next.

1. `step1.yaml` trains the reference model on the proportions that its user would have taken.
2. `step2.yaml` trains the proxy with `mixer: doremi` against it.
3. `step3.yaml` trains the main model on the mean of the proxy's domain weights.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dataflex_mega.commands import _launcher
from dataflex_mega.commands.train import MODULE as TRAIN_MODULE
from dataflex_mega.config.load import load
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.log import get_logger

STEPS = ("step1", "step2", "step3")
SUFFIXES = (".yaml", ".yml", ".json")
AVERAGES = "doremi_average_weights.json"
HELP = """usage: dataflex-cli doremi FOLDER [key=value ...]

FOLDER has step1.yaml (the reference), step2.yaml (the proxy, mixer: doremi) and step3.yaml (the main model), each a complete
configuration with its own output_dir. They are trained one after the other; step 2 gets reference_model, the output_dir
of step 1, and step 3 gets init_mixture_proportions_file, the averages of step 2, whatever the files say. key=value goes to
all three. A step that was interrupted continues from its last checkpoint when the same command is given again; one that had
finished, as its checkpoint at the last step says, trains nothing more."""


SUMMARY = "doremi FOLDER [key=value ...]  DoReMi's three runs, FOLDER/step1.yaml .. step3.yaml, one after the other"
HELP_ORDER = 40


def main(argv: Sequence[str]) -> int:
    """DoReMi's three runs. Returns the exit status of the first that fails, or 0."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    return run_steps(argv, start_training)


def start_training(arguments: list[str]) -> int:
    """Train in processes of their own, so that each step begins with nothing. Returns the exit status."""
    if _launcher.is_needed():
        return _launcher.launch(TRAIN_MODULE, arguments)
    return subprocess.run([sys.executable, "-m", TRAIN_MODULE, *arguments]).returncode


def run_steps(arguments: Sequence[str], start: Callable[[list[str]], int]) -> int:
    """Run all three with `start`, which trains as `train` with these arguments would and returns an exit status.

    Raises ConfigError when a file is missing or two runs would write to one place.
    """
    folder, overrides = Path(arguments[0]), list(arguments[1:])
    files = [find(folder, step) for step in STEPS]
    outputs = [output_of(load(str(file), overrides), file) for file in files]
    if len({path.resolve() for path in outputs}) < len(STEPS):
        raise ConfigError(f"output_dir: {', '.join(map(str, outputs))}: each of the three runs needs its own")
    keys_of_steps = [
        [],
        [f"reference_model={outputs[0]}"],
        [f"init_mixture_proportions_file={outputs[1] / AVERAGES}"],
    ]
    logger = get_logger()
    for step, file, step_keys in zip(STEPS, files, keys_of_steps, strict=True):
        logger.info(f"doremi: {step}: {file} {' '.join(step_keys)}".rstrip())
        status = start([str(file), *overrides, *step_keys])
        if status != 0:
            logger.error("doremi: %s ended with status %d", step, status)
            return status
    return 0


def find(folder: Path, step: str) -> Path:
    """The configuration of a step. Raises ConfigError when the folder has none, or more than one."""
    if not folder.is_dir():
        raise ConfigError(
            f"doremi: {folder} is not a folder; expected one with {', '.join(f'{s}.yaml' for s in STEPS)}"
        )
    files = [folder / f"{step}{suffix}" for suffix in SUFFIXES if (folder / f"{step}{suffix}").is_file()]
    if len(files) != 1:
        names = sorted(path.name for path in folder.iterdir())
        what = f"{len(files)} of them" if files else f"none{did_you_mean(f'{step}.yaml', names)}"
        raise ConfigError(f"doremi: {folder} needs one {step}.yaml, found {what}")
    return files[0]


def output_of(config: dict[str, Any], file: Path) -> Path:
    """Where a run writes. Raises ConfigError when it does not say."""
    if not config.get("output_dir"):
        raise ConfigError(f"output_dir: missing in {file}")
    return Path(str(config["output_dir"]))
