"""`torchrun -m dataflex_mega.train cfg.yaml [key=value ...]`: parse -> build -> fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dataflex_mega.config import launchers
from dataflex_mega.config.checks import check_dynamic, split_names
from dataflex_mega.config.environment import check_environment
from dataflex_mega.config.load import load
from dataflex_mega.config.megatron import engine_of_environment
from dataflex_mega.config.megatron_checks import check_megatron
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.config.paths import named_paths
from dataflex_mega.config.settings_without_effect import notes_on_static
from dataflex_mega.error_lines import Place
from dataflex_mega.errors import Stopped
from dataflex_mega.exit_status import exit_status
from dataflex_mega.llamafactory import predict
from dataflex_mega.log import guard_libraries, log_notes
from dataflex_mega.preemption import default_actions, stop_requests

HELP = """usage: python -m dataflex_mega.train CONFIG.yaml [key=value ...]
       torchrun --nproc_per_node N -m dataflex_mega.train CONFIG.yaml [key=value ...]

CONFIG is a LLaMA-Factory training YAML. Three keys turn it into data-centric training, alone or together:

  selector: loss                 choose which samples to train on      (random, loss, package.module:Class)
  mixer: odm                     move the domain proportions           (static, random, odm, ...)
  weighter: loss                 weigh the samples of a batch          (loss, ...)
  warmup_step, update_step, update_times   when selector and mixer choose anew

DataFlex's own keys (train_type, component_name, components_cfg_file, ...) work as they do there. Without any of these the
run is plain LLaMA-Factory training. key=value changes a key for this run: mixer.alpha=0.8 max_steps=100.
A run that was interrupted continues from its last checkpoint when the same command is given again.
`dataflex-cli components` lists the algorithms and their parameters."""

INTERRUPTED = "interrupted; a run with a role continues from its last checkpoint when the same command is given again"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when trained, 2 for a user's mistake, 1 when training failed, 130 when interrupted.

    Raises errors.Stopped, which ends the program with status 143, after SIGTERM or SIGUSR1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    place = Place()
    with stop_requests(), launchers.preserved(os.environ):  # until the run listens itself
        return exit_status(lambda: run(argv[0], argv[1:], place), INTERRUPTED, place)


def run(path: str, overrides: Sequence[str] = (), place: Place | None = None) -> int:
    """Train as the YAML says -> 0. Raises UserError for mistakes and TrainingFault for faults in the middle.

    `place` is told where the run works as soon as the configuration says so.
    """
    from dataflex_mega.distributed.orphans import end_children
    from dataflex_mega.llamafactory.args import argument_types

    end_children()
    check_environment(os.environ)
    environment = dict(os.environ)  # before LLaMA-Factory is imported, which removes some of the variables
    variable = engine_of_environment(environment)
    config = parse_config(load(path, overrides), argument_types(), variable, environment)
    if place is not None:
        place.folder, place.paths = named_paths(config)
    guard_libraries()
    log_notes(config.notes)
    if config.dataflex.train_type == "static" and config.engine == "fsdp":
        from dataflex_mega.llamafactory.static import run_static
        from dataflex_mega.run.output_folder import refuse_own_run

        datasets = [name for key in ("dataset", "eval_dataset") for name in split_names(config.llamafactory.get(key))]
        refuse_own_run(config.llamafactory)
        log_notes(notes_on_static(config.llamafactory))
        with default_actions():
            run_static(config.llamafactory, list(config.dataflex.callbacks), datasets)
        return 0
    launchers.withdraw(os.environ)  # before LLaMA-Factory acts on them again
    log_notes(check_dynamic(config))
    if predict.is_requested(config.llamafactory):
        predict.check(config.llamafactory)
    if config.engine == "megatron":
        log_notes(check_megatron(config))
    run_dynamic(config)
    return 0


def run_dynamic(config: RunConfig) -> None:
    """Train in the package's own loop, on either engine; without a role every sample is drawn and counts alike."""
    from dataflex_mega.distributed.parallel_info import shutdown_distributed
    from dataflex_mega.run.build import run_training  # imports LLaMA-Factory and transformers

    finished = False
    try:
        run_training(config)
        if predict.is_requested(config.llamafactory):
            predict.predict(config.llamafactory, Path(config.llamafactory["output_dir"]))
        finished = True
    except Stopped as stop:
        finished = stop.agreed
        raise
    finally:
        shutdown_distributed(orderly=finished)


if __name__ == "__main__":
    sys.exit(main())
