"""`torchrun -m dataflex_mega.train cfg.yaml [key=value ...]`: parse -> build -> fit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dataflex_mega.config.checks import check_dynamic, listed
from dataflex_mega.config.load import load
from dataflex_mega.config.megatron import engine_of_environment
from dataflex_mega.config.megatron_checks import check_megatron
from dataflex_mega.config.parse import RunConfig, split
from dataflex_mega.errors import TrainingFault, UserError
from dataflex_mega.llamafactory import predict

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


INTERRUPTED = "interrupted; a run with a role goes on from its last checkpoint when the same command is given again"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when trained; 2 after one line for a user's mistake, 1 when training could not go on, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    try:
        run(argv[0], argv[1:])
    except UserError as error:  # found by every rank alike, so said once
        return _say(error, 2) if os.environ.get("RANK", "0") == "0" else 2
    except TrainingFault as error:
        return _say(error, 1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(INTERRUPTED, file=sys.stderr, flush=True)
        return 130
    return 0


def _say(error: Exception, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if rank != "0" else ""
    print(f"{who}error: {error}", file=sys.stderr, flush=True)
    return status


def run(path: str, overrides: Sequence[str] = ()) -> None:
    """Train as the YAML says. Raises UserError for mistakes and TrainingFault for faults in the middle."""
    from dataflex_mega.llamafactory.args import keys

    variable = engine_of_environment(os.environ)  # now, because importing LLaMA-Factory takes the variables away
    config = split(load(path, overrides), keys(), variable)
    for note in config.notes:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {note}", file=sys.stderr)
    if config.ours.train_type == "static" and config.engine == "fsdp":
        from dataflex_mega.llamafactory.static import run_static

        datasets = [*listed(config.lf.get("dataset")), *listed(config.lf.get("eval_dataset"))]
        run_static(config.lf, list(config.ours.callbacks), datasets)
        return
    check_dynamic(config)
    if predict.wanted(config.lf):
        predict.check(config.lf)
    if config.engine == "megatron":
        check_megatron(config)
    run_dynamic(config)


def run_dynamic(config: RunConfig) -> None:
    """Our own loop, on either engine; without a role it trains plainly."""
    from dataflex_mega.distributed import mesh as meshes
    from dataflex_mega.run.build import Build

    finished = False
    try:
        Build(config).fit()
        if predict.wanted(config.lf):
            predict.predict(config.lf, Path(config.lf["output_dir"]))
        finished = True
    finally:
        meshes.stop(orderly=finished)


if __name__ == "__main__":
    sys.exit(main())
