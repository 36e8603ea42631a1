"""dataflex_mega from Python: training with algorithms of one's own, and LESS scores of any causal model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dataflex_mega.plugins as plugins
from dataflex_mega.algorithms.base import Algorithm
from dataflex_mega.algorithms.selectors.less import Less
from dataflex_mega.config import launchers
from dataflex_mega.config.checks import check_dynamic
from dataflex_mega.config.load import load
from dataflex_mega.config.megatron_checks import check_megatron
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.data.rows import TokenizedRows, tokenize_rows
from dataflex_mega.distributed.collectives import TorchCollectives
from dataflex_mega.distributed.parallel_info import ParallelInfo, init_distributed, process_group_scope
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout, parallelize
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import argument_types
from dataflex_mega.log import log_notes
from dataflex_mega.providers.context import SignalContext
from dataflex_mega.providers.registry import display_name
from dataflex_mega.providers.server import SignalServer
from dataflex_mega.run.build import run_training
from dataflex_mega.run.outputs import OutputOptions
from dataflex_mega.run.roles import parameters_of
from dataflex_mega.signals.pool_share import PoolShare

PLAIN = (bool, int, float, str, list, tuple, dict)  # parameters that a configuration can hold


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainResult:
    """What a training gives back; equal on every rank."""

    metrics: list[dict[str, Any]]  # one row per step, as in metrics.jsonl
    evaluations: list[dict[str, float]]  # one row per evaluation, with its step
    final_proportions: dict[str, float]  # of the last plan, by domain
    model: Any  # the Hugging Face or PEFT model; of a Megatron run, this stage's first chunk
    output_dir: Path | None  # None when no files were wanted


def train(
    config: str | Path | Mapping[str, Any] | RunConfig,
    *,
    selector: Algorithm | str | Mapping[str, Any] | None = None,
    mixer: Algorithm | str | Mapping[str, Any] | None = None,
    reorder: Algorithm | str | Mapping[str, Any] | None = None,
    weighter: Algorithm | str | Mapping[str, Any] | None = None,
    files: bool = False,
    progress_bar: bool = False,
    **overrides: Any,
) -> TrainResult:
    """Train as `torchrun -m dataflex_mega.train` would, in this process (or these, under torchrun).

    Args:
        config: the path of a YAML, its keys as a mapping, or a checked configuration.
        selector, mixer, reorder, weighter: an algorithm as an instance, a name, or {"name": ..., parameters}.
        files: whether logs, checkpoints, pictures and the trained model go into `output_dir`, as from the command line.
            Without, nothing is written there.
        progress_bar: whether progress is shown.
        overrides: keys of the configuration, such as max_steps=100.

    Raises:
        UserError: a mistake in the configuration, the data or the algorithms, in one line.
        TrainingFault: training could not go on.
    """
    roles = {"selector": selector, "mixer": mixer, "reorder": reorder, "weighter": weighter}
    instances = {role: one for role, one in roles.items() if isinstance(one, Algorithm)}
    specs = {role: _spec_of(role, one) for role, one in roles.items() if one is not None}
    with ExitStack() as stack:
        if isinstance(config, RunConfig):
            parsed = config
            if specs or overrides or not files:
                keys = {**config.all_keys, **specs, **overrides}
                parsed = _parse(keys, files, stack)
        else:
            keys = load(str(config), ()) if isinstance(config, str | Path) else dict(config)
            parsed = _parse({**keys, **specs, **overrides}, files, stack)
        return _train(parsed, instances, files, progress_bar, stack)


def _parse(keys: Mapping[str, Any], files: bool, stack: ExitStack) -> RunConfig:
    keys = dict(keys)
    if not files:
        keys["output_dir"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="dataflex_mega_"))
        keys = {"tensorboard": False, **keys, "save_strategy": "no", "plot_loss": False}
    stack.enter_context(launchers.preserved(os.environ))
    config = parse_config(keys, argument_types(), environment=launchers.without_traces(os.environ))
    launchers.withdraw(os.environ)
    log_notes(config.notes)
    return config


def _train(
    config: RunConfig, instances: Mapping[str, Algorithm], files: bool, progress_bar: bool, stack: ExitStack
) -> TrainResult:
    if config.dataflex.train_type == "static" and config.engine == "fsdp":
        raise ConfigError(
            "dm.train: give a selector, mixer, reorder or weighter; plain training is LLaMA-Factory's own"
        )
    log_notes(check_dynamic(config))
    if config.engine == "megatron":
        log_notes(check_megatron(config))
    stack.enter_context(process_group_scope())
    options = OutputOptions(progress_bar=progress_bar, logs=files, export=files, plots=files, history=True)
    run, trainer, state = run_training(config, instances, options)
    proportions = dict(zip(run.data.pool.names, state.plan.proportions, strict=True))
    folder = run.session.output_dir if files else None
    return TrainResult(trainer.metrics.history, trainer.metrics.evaluations, proportions, trainer.engine.model, folder)


def _spec_of(role: str, algorithm: Algorithm | str | Mapping[str, Any]) -> Any:
    """What the configuration says of an algorithm; an instance's own class is registered for this program."""
    if not isinstance(algorithm, Algorithm):
        return algorithm
    cls = type(algorithm)
    packaged = cls.__module__.startswith("dataflex_mega.algorithms.")
    name = display_name(algorithm) if packaged else plugins.register_class(role, cls)
    plain = {key: value for key, value in parameters_of(algorithm).items() if isinstance(value, PLAIN)}
    return {"name": name, **plain}


# -- LESS --------------------------------------------------------------------------------------------------------------


def tokenize(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    text: str = "text",
    max_length: int | None = None,
    prompt: str | None = None,
) -> list[dict[str, np.ndarray]]:
    """Rows with a text -> rows with input_ids and labels, int64, in the same order.

    Args:
        text: the column whose tokens are targets.
        max_length: tokens of a row, at most; the end is cut off.
        prompt: a column that comes before and carries no loss.
    """
    return tokenize_rows(dataset, tokenizer, text, max_length, prompt)


def less_scores(
    model: Any,
    tokenizer: Any,
    train: Sequence[Any],
    targets: Sequence[Any] | Mapping[str, Sequence[Any]],
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
) -> Tensor:
    """LESS scores (arXiv 2402.04333) of training samples: the largest, over target sets, of the mean cosine of the sample's
    gradient with the targets'. Exact: no projection, no store.

    Args:
        model: a causal model of transformers, or a PEFT model; the linear layers that train count. Gradients that it holds
            are cleared, parameters stay.
        tokenizer: for padding, and for texts.
        train: N rows (a datasets.Dataset or a list) with input_ids and optionally labels, or with a
            "text", or texts; see `tokenize`.
        targets: the same, one set or several by name.
        optimizer: a torch Adam or AdamW of the model, whose moments precondition the samples' gradients; None: plain ones.
        batch_size: samples of a backward pass on one process.
        max_length: see `tokenize`.

    Returns:
        [N] float32 on the CPU. Under torchrun the rows are divided over processes, and every process gets all scores.

    Raises:
        DataError: an empty set, or rows without tokens.
        ConfigError: an optimizer that is not Adam.
    """
    sets = dict(targets) if isinstance(targets, Mapping) else {"targets": targets}
    rows = partial(TokenizedRows.from_dataset, tokenizer=tokenizer, max_length=max_length)
    pool = SamplePool([Domain("train", rows(train))])
    evaluation = {name: SamplePool([Domain(name, rows(one))]) for name, one in sets.items()}
    was_training = model.training
    with process_group_scope():
        parallel_info = replace(init_distributed(), device=next(model.parameters()).device)
        engine = _engine_of(model, optimizer, parallel_info)
        try:
            return _score(engine, pool, evaluation, tokenizer, optimizer is not None, batch_size)
        finally:
            model.train(was_training)


def _engine_of(model: Any, optimizer: torch.optim.Optimizer | None, parallel_info: ParallelInfo) -> FSDPEngine:
    """The model as it is; with several processes each has all of it, and gradients are averaged."""
    layout = FSDPLayout("ddp" if parallel_info.world_size > 1 else "single")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    unused = torch.optim.SGD(trained, lr=0.0)  # no step is taken
    runner = FSDPModelRunner(parallelize(model, layout, parallel_info), layout, parallel_info)
    return FSDPEngine(runner, optimizer or unused, None, StepOptions(num_domains=1))


def _score(
    engine: FSDPEngine,
    pool: SamplePool,
    evaluation: Mapping[str, SamplePool],
    tokenizer: Any,
    adam: bool,
    batch_size: int,
) -> Tensor:
    parallel_info, collectives = engine.parallel_info, TorchCollectives(engine.parallel_info)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    context = SignalContext(
        parallel_info=parallel_info,
        collectives=collectives,
        pool=pool,
        evaluation=evaluation,
        collate=partial(collate, pad_id=pad_id, pack_length=None),
        batch_size=batch_size,
        seed=0,
        engine=engine,
        tokenizer=tokenizer,
        output_dir=Path(),
        cutoff_len=0,
        report=lambda *_: None,
    )
    selector = Less(gradient_type="adam" if adam else "sgd")
    share = PoolShare(pool, batch_size, parallel_info.dp_rank, parallel_info.dp_size)
    table, counts = SignalServer(context, share).table(selector, None, step=0)
    return collectives.all_gather_uneven(selector.score(table).float(), counts)
