"""What libraries would refuse, or never do, once the model is built: tried between the data and the model."""

from __future__ import annotations

import math
from typing import Any

from dataflex_mega.llamafactory.callbacks import check_metric
from dataflex_mega.llamafactory.optim import check_optimizer, check_schedule
from dataflex_mega.llamafactory.similarity import METRICS as SIMILARITIES
from dataflex_mega.run.answers import answers_prompts, notes_on_answers
from dataflex_mega.run.data import RunData
from dataflex_mega.run.evaluation import DOMAIN_LOSS, DomainLoss
from dataflex_mega.run.preference import sample_loss
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.session import Session

METRICS = ("loss", "perplexity")  # of each evaluation set
PLATEAU = "reduce_lr_on_plateau"


def check(session: Session, data: RunData, schedule: RunSchedule) -> None:
    """Raises ConfigError naming the key of an optimizer's or a schedule's argument, or of a metric that no evaluation will
    give."""
    check_schedule(session.args, check_optimizer(session.args), schedule.max_steps)
    direction_is_set = session.config.llamafactory.get("greater_is_better") is not None
    reported = sample_loss(session.args).report_names
    metrics = ("loss", *reported) if reported else METRICS
    metrics += ("accuracy",) if session.args.finetuning.compute_accuracy else ()
    metrics += SIMILARITIES if answers_prompts(session, data.evaluation) else ()
    names = metric_names(list(data.evaluation), metrics)
    if DomainLoss.of(list(data.evaluation), schedule.domains) is not None:
        names.append(DOMAIN_LOSS)
    check_metric(session.args, names, session.callbacks, direction_is_set)
    epochs = schedule.max_steps * schedule.partition.global_batch_size / schedule.epoch_samples
    notes = [*idle_patience(session.args, schedule.max_steps, epochs), *notes_on_answers(session, data.evaluation)]
    session.report(*(f"note: {note}" for note in notes))


def idle_patience(args: Any, max_steps: int, epochs: float) -> list[str]:
    """Messages about a patience that the evaluations of the run cannot exhaust."""
    count, notes = num_evaluations(args.training, max_steps, epochs), []
    patience = args.finetuning.early_stopping_steps
    if patience is not None and patience >= count:
        notes.append(f"early_stopping_steps: {patience} has no effect: the run has {count} evaluations")
    if str(args.training.lr_scheduler_type.value) == PLATEAU:
        arguments = args.training.lr_scheduler_kwargs or {}
        least = (
            arguments.get("patience", 10) + 2
        )  # the first sets the best value; the rate falls after patience + 1 more
        if least > count:
            notes.append(
                f"lr_scheduler_type: {PLATEAU} keeps learning_rate: it falls after {least} evaluations at the earliest, the "
                f"run has {count}; lr_scheduler_kwargs: {{patience: N}} changes that"
            )
    return notes


def num_evaluations(training: Any, max_steps: int, epochs: float) -> int:
    """How often a run is evaluated, by the rules of transformers' DefaultFlowCallback."""
    strategy, delay = str(training.eval_strategy.value), training.eval_delay or 0
    if strategy == "epoch":
        ends = [*range(1, int(epochs + 1e-9) + 1), *([epochs] if epochs % 1 > 1e-9 else [])]
        return sum(end >= delay for end in ends)
    if strategy != "steps":
        return 0
    every = training.eval_steps or training.logging_steps
    every = math.ceil(max_steps * every) if every < 1 else int(every)
    steps = {*range(every, max_steps + 1, every), max_steps}
    return sum(step >= delay for step in steps)


def metric_names(sets: list[str], metrics: tuple[str, ...] = METRICS) -> list[str]:
    """What an evaluation gives for evaluation sets of these names; one without a name is the only one."""
    return [f"eval_{name}_{metric}" if name else f"eval_{metric}" for name in sets for metric in metrics]
