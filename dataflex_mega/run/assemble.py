"""The last stage of a run: the loop with its parts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import dataflex_mega.gauges as gauges
from dataflex_mega.control.controller import DataController
from dataflex_mega.data.loader import Loader
from dataflex_mega.engines.base import Engine
from dataflex_mega.errors import TrainingFault
from dataflex_mega.llamafactory.callbacks import CallbackHooks, watched_metric
from dataflex_mega.metrics import Metrics
from dataflex_mega.progress import TrainingProgressBar
from dataflex_mega.providers.server import SignalServer
from dataflex_mega.run.accuracy import evaluate_with_accuracy
from dataflex_mega.run.answers import answer_metrics, answers_prompts
from dataflex_mega.run.checkpoint_contents import contents_of
from dataflex_mega.run.data import RunData
from dataflex_mega.run.evaluation import DOMAIN_LOSS, DomainLoss, speed
from dataflex_mega.run.ordering import ordered_passes, stage_config
from dataflex_mega.run.outputs import OutputOptions
from dataflex_mega.run.preference import sample_loss
from dataflex_mega.run.resume import ResumePoint
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.schedule import RunSchedule
from dataflex_mega.run.selection import scoreboard_folder, selection_folder
from dataflex_mega.run.session import Session
from dataflex_mega.signals.pool_share import PoolShare, evaluate
from dataflex_mega.trainer import Trainer

LARGEST_EXPONENT = 700.0  # exp of it is finite


def assemble(
    session: Session,
    roles: RunRoles,
    data: RunData,
    schedule: RunSchedule,
    resume: ResumePoint,
    engine: Engine,
    options: OutputOptions | None = None,
) -> Trainer:
    """The loop of a run whose model is built."""
    options = options or OutputOptions()
    training = session.args.training
    shown = session.parallel_info.is_main and options.progress_bar and not training.disable_tqdm
    bar = TrainingProgressBar(every=max(1, int(training.logging_steps))) if shown else None
    parts = {
        "model": engine.model,
        "processing_class": session.tokenizer,
        "optimizer": engine.optimizer,
        "lr_scheduler": engine.scheduler,
    }
    min_delta = session.config.dataflex.early_stopping_min_delta
    num_epochs = math.ceil(schedule.max_steps * schedule.partition.global_batch_size / len(data.pool))
    hooks = CallbackHooks(
        session.args, parts, schedule.max_steps, session.callbacks, min_delta, num_epochs, session.trackers
    )
    resume.checkpointer.best = hooks.best_checkpoint
    metrics = _metrics(session, roles, data, schedule, resume, options, bar)
    half, world = bool(training.bf16 or training.fp16), session.parallel_info.world_size
    metrics.mfu_per_token_rate = gauges.mfu_per_token_rate(engine.model, half, world)
    workers = max(1, training.dataloader_num_workers)
    prefetch = session.config.dataflex.prefetch
    resume.checkpointer.contents = contents_of(session, hooks)
    return Trainer(
        engine=engine,
        controller=_controller(session, roles, data, schedule, engine, bar),
        loader=Loader(data.pool, schedule.sampler, schedule.partition, data.collate, prefetch, workers),
        checkpointer=resume.checkpointer,
        hooks=hooks,
        metrics=metrics,
        max_steps=schedule.max_steps,
        global_batch_size=schedule.partition.global_batch_size,
        pool_size=schedule.epoch_samples,
        evaluate=_evaluation(session, roles, data, schedule, engine),
        evaluation_sets=tuple(data.evaluation),
        evaluates_at_start=training.eval_on_start,
        evaluates_at_end=training.do_eval and training.eval_strategy == "no",
        loads_best=training.load_best_model_at_end,
        describe_sample=data.pool.describe,
        restate_plan=resume.restate_plan,
        on_loaded=resume.begin,
    )


def _pool_share(session: Session, roles: RunRoles, pool: Any, progress: Any = None) -> PoolShare:
    of_order = roles.reorder.scores.batch_size if roles.reorder is not None else None
    keys, training = session.config.dataflex, session.args.training
    size = keys.score_batch_size or of_order or training.per_device_eval_batch_size
    return PoolShare(pool, size, session.parallel_info.dp_rank, session.parallel_info.dp_size, progress)


def _controller(
    session: Session, roles: RunRoles, data: RunData, schedule: RunSchedule, engine: Engine, bar: Any
) -> DataController:
    share = _pool_share(session, roles, data.pool, bar and bar.update_scoring)
    return DataController(
        roles=roles.algorithms,
        domains=schedule.domains,
        stages=stage_config(session, roles, schedule.score_source, schedule.update_schedule),
        sampler=schedule.sampler,
        collectives=session.collectives,
        signals=SignalServer(data.signal_context(session, engine), share),
        total_steps=schedule.max_steps,
        seed=session.data_seed,
        limits=schedule.limits,
        candidates=schedule.candidates,
        passes=ordered_passes(roles, data.pool),
        learning_rate=engine.learning_rate,
    )


def _metrics(
    session: Session,
    roles: RunRoles,
    data: RunData,
    schedule: RunSchedule,
    resume: ResumePoint,
    options: OutputOptions,
    bar: Any,
) -> Metrics:
    writer, writes = None, session.parallel_info.is_main and options.logs
    if writes and session.config.dataflex.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # What an interrupted run logged beyond the checkpoint is hidden; it is logged again.
        folder = str(session.args.training.logging_dir or session.output_dir / "runs")
        writer = SummaryWriter(folder, purge_step=resume.first_step + 1 if resume.first_step else None)
    mixer = str(roles.specs["mixer"]["name"]).rpartition(":")[2].lower() if "mixer" in roles.specs else None
    return Metrics(
        session.output_dir,
        data.pool.names,
        schedule.max_steps,
        is_writer=writes,
        mixer_name=mixer,
        selection_folder=selection_folder(session, roles),
        scoreboard_folder=scoreboard_folder(session, roles),
        tensorboard=writer,
        progress_bar=bar,
        keep_history=options.history,
    )


def _evaluation(
    session: Session, roles: RunRoles, data: RunData, schedule: RunSchedule, engine: Engine
) -> Callable[[], dict[str, float]] | None:
    """What evaluates all sets; None without any."""
    if not data.evaluation:
        return None
    evaluation = partial(_evaluate, session, roles, data, engine)
    domain_loss = DomainLoss.of(list(data.evaluation), schedule.domains)
    wanted = watched_metric(session.args.training) == DOMAIN_LOSS
    return domain_loss.added_to(evaluation) if wanted and domain_loss is not None else evaluation


def _evaluate(session: Session, roles: RunRoles, data: RunData, engine: Engine) -> dict[str, float]:
    """Token-mean loss of each evaluation set, under Trainer's names, its exponential, and what else is asked for; of pairs
    their mean loss and what it reports."""
    metrics, counts_hits = {}, session.args.finetuning.compute_accuracy
    names = sample_loss(session.args).report_names
    for name, pool in data.evaluation.items():
        started = time.perf_counter()
        share = _pool_share(session, roles, pool)
        report = torch.zeros(len(names), dtype=torch.float64)
        if counts_hits:
            sums = evaluate_with_accuracy(share, data.collate, engine)
        else:
            sums = evaluate(share, data.collate, engine.sample_losses, report)
        loss, tokens, *hits = (session.collectives.all_reduce_sum(part) for part in sums)
        loss, tokens = loss.sum(), tokens.sum()
        if not float(tokens) > 0:
            raise TrainingFault(f"eval_dataset {name!r}: no target token, so there is no loss")
        mean = float(loss / tokens)
        prefix = f"eval_{name}" if name else "eval"
        metrics[f"{prefix}_loss"] = mean
        if names:
            means = (session.collectives.all_reduce_sum(report) / tokens).tolist()
            metrics.update({f"{prefix}_{key}": value for key, value in zip(names, means, strict=True)})
        else:
            metrics[f"{prefix}_perplexity"] = math.exp(min(mean, LARGEST_EXPONENT))
        if hits:
            metrics[f"{prefix}_accuracy"] = float(hits[0][0] / hits[0][1])
        if answers_prompts(session, data.evaluation):
            answers = answer_metrics(session, share, engine)
            metrics.update({f"{prefix}_{metric}": value for metric, value in answers.items()})
        batch = session.args.training.per_device_eval_batch_size * session.parallel_info.dp_size
        metrics.update(speed(prefix, time.perf_counter() - started, len(pool), batch))
    return metrics
