"""What a run leaves behind: the model in Hugging Face layout, averages of a mixer, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import dataflex_mega.plots as plots
from dataflex_mega.control import contracts
from dataflex_mega.errors import cause_of
from dataflex_mega.files import published_model
from dataflex_mega.llamafactory.model import save_tokenizer
from dataflex_mega.run import results
from dataflex_mega.run.averages import write_averages
from dataflex_mega.run.data import RunData
from dataflex_mega.run.next_commands import next_commands
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


class report_failure:  # used as a statement
    """A block whose failure does not decide how a training ends: it is added to `problems` as a line."""

    def __init__(self, what: str, problems: list[str]) -> None:
        self.what, self.problems = what, problems

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False  # nothing, or an interrupt
        self.problems.append(f"{self.what}: not drawn: {cause_of(error)}; the model and the logs are complete")
        return True


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
    evaluation = results.evaluation_of_model(trainer, options.logs and session.args.training.do_eval)
    if not session.parallel_info.is_main:
        return
    if options.export:
        with published_model(folder) as temporary:
            save_tokenizer(session.tokenizer_module, temporary)
            trainer.hooks.save_arguments(temporary)
    if options.logs:
        _write_metrics(folder, trainer, evaluation)
    problems: list[str] = []
    if options.plots and session.args.finetuning.plot_loss:
        with report_failure("plot_loss", problems):
            trainer.hooks.plot_loss()
    mixer = roles.algorithms.mixer
    averages = None if mixer is None else contracts.average_weights(mixer, len(data.pool.names))
    if options.logs and averages is not None:
        write_averages(folder, str(roles.specs["mixer"]["name"]), data.pool.names, averages)
    pictures: list[Path] = []
    if options.plots and options.logs:
        with report_failure("plots", problems):
            pictures = plots.plot_run(folder)
    session.report(*(f"note: {problem}" for problem in problems))
    if options.export:
        session.report(f"{trainer.outcome}; model and logs in {folder}", *(f"plot: {p}" for p in pictures))
        session.report(*next_commands(session.config.llamafactory, folder))


def _write_metrics(folder: Path, trainer: Trainer, evaluation: dict[str, float]) -> None:
    results.write_metrics(folder, "train", trainer.hooks.train_results)
    if evaluation:
        results.write_metrics(folder, "eval", {**evaluation, "epoch": trainer.hooks.train_results["epoch"]})
