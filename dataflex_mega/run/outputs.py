"""What a run leaves behind: the model in Hugging Face layout, averages of a mixer, pictures."""

from __future__ import annotations

from dataclasses import dataclass

import dataflex_mega.plots as plots
from dataflex_mega.control import contracts
from dataflex_mega.files import published_model
from dataflex_mega.run.averages import write_averages
from dataflex_mega.run.data import RunData
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.session import Session
from dataflex_mega.trainer import Trainer


@dataclass(frozen=True)
class OutputOptions:
    """Which files and displays a run makes; a training from the command line makes all."""

    progress_bar: bool = True
    logs: bool = True  # metrics.jsonl, TensorBoard and the other logs of the run
    export: bool = True  # the model
    plots: bool = True
    history: bool = False  # rows of metrics in memory, for Python


def write_results(
    session: Session,
    roles: RunRoles,
    data: RunData,
    schedule: RunSchedule,
    trainer: Trainer,
    options: OutputOptions,
) -> None:
    """Write the model and what belongs to it into output_dir; every rank calls it."""
    folder = session.output_dir
    if options.export:
        trainer.engine.export(folder)
    if not session.parallel_info.is_main:
        return
    if options.export:
        with published_model(folder) as temporary:
            session.tokenizer.save_pretrained(temporary)
    if options.plots and session.args.finetuning.plot_loss:
        trainer.hooks.plot_loss()
    mixer = roles.algorithms.mixer
    averages = None if mixer is None else contracts.average_weights(mixer, len(data.pool.names))
    if options.logs and averages is not None:
        write_averages(folder, str(roles.specs["mixer"]["name"]), data.pool.names, averages)
    pictures = plots.plot_run(folder) if options.plots and options.logs else []
    if options.export:
        session.report(f"{trainer.outcome}; model and logs in {folder}", *(f"plot: {p}" for p in pictures))
