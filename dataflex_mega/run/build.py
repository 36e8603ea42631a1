"""A dynamic run from its configuration: the one place that wires parts."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from dataflex_mega.config.parse import RunConfig
from dataflex_mega.errors import CheckpointError

LARGEST_EXPONENT = 700.0  # exp of it is finite


class Opened:
    """What a configuration names: algorithms, arguments, processes, data. No model is built, nothing is written."""

    def __init__(self, config: RunConfig) -> None:
        from dataflex_mega.distributed.collectives import TorchCollectives
        from dataflex_mega.llamafactory import args as lf_args
        from dataflex_mega.llamafactory.callbacks import load_callbacks
        from dataflex_mega.llamafactory.model import load_tokenizer
        from dataflex_mega.providers import registry as providers
        from dataflex_mega.run import corpus
        from dataflex_mega.run.engines import backend_of

        self.config, self.ours = config, config.dataflex
        self.roles = self._roles()
        for selector in self.measured:
            providers.check(config.engine, selector, stage=str(config.llamafactory.get("stage", "sft")))
        providers.check_weighter(config.engine, self.roles.weighter)
        for kind, spec in self.specs.items():
            providers.check_layers(config.engine, kind, spec["name"], getattr(self.roles, kind, None))
        self.backend = backend_of(config)
        self.args = lf_args.parse_arguments(lf_args.prepare_arguments(corpus.lf_keys(config)))
        self.callbacks = load_callbacks(list(self.ours.callbacks))
        self.tokenizer_module, self.template = load_tokenizer(self.args)
        self.backend.start(self.args, len(self.tokenizer_module["tokenizer"]))
        self.parallel_info = self.backend.parallel_info
        self.say(*(f"note: {note}" for note in self.backend.notes))
        self.collectives = TorchCollectives(self.parallel_info)
        self.output = Path(self.args.training.output_dir)
        self._read_data()

    def _roles(self) -> Any:
        from dataflex_mega.control.controller import RoleSet
        from dataflex_mega.registry import build
        from dataflex_mega.run.ordering import scoring_selector, weigher_of

        self.order, self.pipeline = self.config.reorder, self.config.pipeline
        self.scoring = scoring_selector(self.order)  # what a reorder sorts by, where it is measured
        specs = dict(self.config.roles)
        made: dict[str, Any] = {kind: build(kind, spec) for kind, spec in specs.items()}
        # With all defaults filled in, so that a run is the same however its YAML was written.
        self.specs = {kind: {"name": specs[kind]["name"], **parameters_of(made[kind])} for kind in made}
        if self.order is not None:
            self.specs["reorder"].update(order=self.order.identity())
        if self.pipeline is not None:
            self.specs["pipeline"] = {"name": "pipeline", "stages": self.pipeline.identity()}
            if "weighter" in made:
                self.specs["weighter"]["others"] = list(self.pipeline.weighter_specs[1:])
                made["weighter"] = weigher_of(self.pipeline, made["weighter"])
        return RoleSet(**made)

    @property
    def measured(self) -> list[Any]:
        """The selectors whose signals are measured."""
        return [selector for selector in (self.roles.selector, self.scoring) if selector is not None]

    # -- data ----------------------------------------------------------------------------------------------------

    def _read_data(self) -> None:
        from dataflex_mega.data.collate import collate
        from dataflex_mega.data.pool import Domain, SamplePool
        from dataflex_mega.llamafactory.data import load_data
        from dataflex_mega.providers import domain_gradients as mixing
        from dataflex_mega.providers import targets
        from dataflex_mega.run import corpus
        from dataflex_mega.run.offline_files import check_files

        if self.ours.corpus_dir is not None:
            bundle, notes = corpus.load(self.config, self.args, self.tokenizer_module["tokenizer"])
            self.say(*notes)
        else:
            bundle = load_data(self.args, self.tokenizer_module, self.template)
        self.pool = SamplePool(bundle.domains)
        self.evaluation = {name: SamplePool([Domain(name or "eval", rows)]) for name, rows in bundle.evaluation.items()}
        targets.check(self)
        mixing.check(self)
        check_files(self)
        tokenizer = self.tokenizer_module["tokenizer"]
        packs = self.args.finetuning.stage == "sft" and (self.args.data.packing or self.args.data.neat_packing)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.collate = partial(collate, pad_id=pad, pack_length=self.args.data.cutoff_len if packs else None)

    def say(self, *lines: str) -> None:
        """To standard error, once."""
        if self.parallel_info.is_main:
            for line in lines:
                print(line, file=sys.stderr, flush=True)


class Build(Opened):
    """The parts of a dynamic run, made in the order in which a user's mistakes are cheapest to find."""

    def __init__(self, config: RunConfig) -> None:
        from dataflex_mega.run import reference

        super().__init__(config)
        self._plan_run()
        self.reference = reference.find(self)
        self._find_checkpoint()
        if self.reference is not None:
            reference.ensure(self, self.reference)
            self.pool.reference_losses = self.reference

    # -- schedule ------------------------------------------------------------------------------------------------

    def _plan_run(self) -> None:
        from dataflex_mega.algorithms.base import DomainInfo
        from dataflex_mega.control.schedule import RunLength, UpdateSchedule, total_steps
        from dataflex_mega.data.loader import BatchPartition
        from dataflex_mega.data.sampler import Sampler
        from dataflex_mega.run.ordering import source_of
        from dataflex_mega.run.selection import candidates_of

        training, ours = self.args.training, self.ours
        self.batch_partition = BatchPartition(
            self.parallel_info.dp_rank,
            self.parallel_info.dp_size,
            training.per_device_train_batch_size,
            training.gradient_accumulation_steps,
        )
        selects, mixes = self.roles.selector is not None, self.roles.mixer is not None
        staged = self.order is not None or self.pipeline is not None
        self.schedule = UpdateSchedule(ours.warmup_step, ours.update_step, ours.update_times, selects and not staged)
        run_length = RunLength(
            ours.train_step, training.max_steps, training.num_train_epochs, len(self.pool), self.batch_partition.global_batch_size
        )
        self.max_steps = total_steps(
            run_length, self.schedule, ours.update_step > 0 if staged else selects, mixes and self.pipeline is None
        )
        self.sampler = Sampler(self.pool.sizes, self.batch_partition.global_batch_size, self.data_seed)
        initial = self.config.initial_proportions(self.pool.sizes, self.pool.names)
        self.domains = DomainInfo(self.pool.names, self.pool.sizes, initial)
        self.limits = self._limits()
        self.source = source_of(self)
        self.candidates = candidates_of(self)

    def _limits(self) -> Any:
        """Floors, caps and epochs of the domains, or None without them. Raises ConfigError for ones that cannot hold."""
        from dataflex_mega.data.limits import make_limits

        ours = self.ours
        keys = {"min_proportion": ours.min_proportion, "max_proportion": ours.max_proportion}
        limits = make_limits(self.domains.names, self.domains.num_samples, keys, ours.max_epochs)
        if limits is not None:
            limits.check_run(self.max_steps * self.batch_partition.global_batch_size)
        return limits

    @property
    def data_seed(self) -> int:
        """data_seed, or seed where it is not set."""
        training = self.args.training
        return training.seed if training.data_seed is None else training.data_seed

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> None:
        from dataflex_mega.checkpoint import Checkpointer, remove_later_than
        from dataflex_mega.config.identity import identity
        from dataflex_mega.run import ordering as orders

        wanted = self.config.llamafactory.get("resume_from_checkpoint")
        who = identity(self.config, self.batch_partition.global_batch_size, self.pool.fingerprint(), self.specs)
        who.update(orders.fingerprint(self.source))
        if self.reference is not None:
            who["reference"] = self.reference.identity["model"]
        if self.ours.init_mixture_proportions_file is not None:
            who["init_mixture_proportions"] = list(self.domains.initial_proportions)
        keep = self.args.training.save_total_limit
        self.checkpointer = Checkpointer(self.output, self.collectives, who, keep, tuple(self.ours.resume_ignore))
        self.resume: Path | None = None
        self.restate_plan: Any = None
        self.first_step = 0
        if self.parallel_info.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.config.llamafactory.get("overwrite_output_dir") and not wanted:
                remove_later_than(self.output, -1)
        self.collectives.barrier()
        if isinstance(wanted, str) and wanted:
            self.resume = Path(wanted)
            if not self.resume.is_dir():
                raise CheckpointError(f"resume_from_checkpoint: {wanted} is not a folder")
        else:
            self.resume, notes = self.checkpointer.latest()
            self.say(*notes)
        if self.resume is not None and wanted is False:
            raise CheckpointError(
                f"resume_from_checkpoint: false, but there is {self.resume}; use another output_dir or "
                "overwrite_output_dir: true"
            )
        if self.resume is not None:
            self._adopt_checkpoint(self.resume)

    def _adopt_checkpoint(self, path: Path) -> None:
        from dataflex_mega.checkpoint import remove_later_than
        from dataflex_mega.data.sampler import Sampler

        saved = self.checkpointer.read(path)
        former = saved["identity"]["global_batch_size"]
        if former != self.batch_partition.global_batch_size:  # the steps of its plan were counted in batches of that size
            self.restate_plan = Sampler(self.pool.sizes, former, self.data_seed).plan_from
        self.first_step = saved["step"]
        if self.parallel_info.is_main and path.resolve().parent == self.output.resolve():
            remove_later_than(self.output, self.first_step)
        self.say(f"continuing from {path} at step {self.first_step} of {self.max_steps}")

    # -- the run -------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Build the model, train, export."""
        trainer = self.trainer()
        try:
            trainer.fit(self.resume)
        finally:
            trainer.loader.close()
        self._finish(trainer.engine, trainer)

    def trainer(self) -> Any:
        """The loop with all its parts; builds the model."""
        from dataflex_mega.llamafactory.callbacks import Hooks
        from dataflex_mega.progress import TrainingProgressBar
        from dataflex_mega.providers import targets
        from dataflex_mega.trainer import Trainer
        from dataflex_mega.types import NeedsLoads

        shown = self.parallel_info.is_main and not self.args.training.disable_tqdm
        self.bar = TrainingProgressBar(every=max(1, int(self.args.training.logging_steps))) if shown else None
        engine = self.backend.engine(
            self.tokenizer_module["tokenizer"],
            len(self.pool.sizes),
            self.max_steps,
            targets.hidden_spec(self),
            isinstance(self.roles.mixer, NeedsLoads),
        )
        parts = {
            "model": engine.model,
            "processing_class": self.tokenizer_module["tokenizer"],
            "optimizer": engine.optimizer,
            "lr_scheduler": engine.scheduler,
        }
        delta = self.ours.early_stopping_min_delta
        return Trainer(
            engine=engine,
            controller=self._controller(engine),
            loader=self._loader(),
            checkpointer=self.checkpointer,
            hooks=Hooks(self.args, parts, self.max_steps, self.callbacks, delta),
            metrics=self._metrics(),
            max_steps=self.max_steps,
            global_batch_size=self.batch_partition.global_batch_size,
            pool_size=len(self.pool),
            evaluate=partial(self._evaluate, engine) if self.evaluation else None,
            describe_sample=self.pool.describe,
            restate_plan=self.restate_plan,
        )

    def _signal_computer(self, engine: Any, pool: Any, progress: Any = None, targets: Any = None) -> Any:
        from dataflex_mega.signals.computer import SignalComputer

        of_order = self.order.scores.batch_size if self.order is not None else None
        size = self.ours.score_batch_size or of_order or self.args.training.per_device_eval_batch_size
        dp_rank, dp_size = self.parallel_info.dp_rank, self.parallel_info.dp_size
        return SignalComputer(pool, self.collate, engine.sample_losses, size, dp_rank, dp_size, progress, targets)

    def _controller(self, engine: Any) -> Any:
        from dataflex_mega.control.controller import DataController
        from dataflex_mega.control.staged import PipelineController
        from dataflex_mega.providers import domain_gradients as mixing
        from dataflex_mega.providers import targets
        from dataflex_mega.providers.batch_gradients import batch_gradients
        from dataflex_mega.providers.registry import providers
        from dataflex_mega.run.ordering import ordering_of, stages_of

        computer = self._signal_computer(engine, self.pool, self.bar and self.bar.update_scoring, targets.for_gradients(self, engine))
        computer.providers = providers(self, engine)
        parts = (self.roles, self.domains, self.schedule, self.sampler, self.collectives, computer)
        counts = (self.batch_partition.global_batch_size, self.max_steps, self.data_seed)
        mean, gram = targets.mean_of_targets(self, engine), mixing.domain_gram(self, engine)
        more = (self.limits, mean, self.candidates, gram, batch_gradients(self, engine), engine.learning_rate)
        if self.order is None and self.pipeline is None:
            return DataController(*parts, *counts, *more)
        stages = stages_of(self, self.source)
        return PipelineController(*parts, *counts, *more, stages=stages, passes=ordering_of(self))

    def _loader(self) -> Any:
        from dataflex_mega.data.loader import Loader

        workers = max(1, self.args.training.dataloader_num_workers)
        return Loader(self.pool, self.sampler, self.batch_partition, self.collate, self.ours.prefetch, workers)

    def _metrics(self) -> Any:
        from dataflex_mega.metrics import Metrics
        from dataflex_mega.run.selection import boards_of, files_of

        writer = None
        if self.parallel_info.is_main and self.ours.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted run logged beyond the checkpoint is hidden; it is logged again.
            folder = str(self.args.training.logging_dir or self.output / "runs")
            writer = SummaryWriter(folder, purge_step=self.first_step + 1 if self.first_step else None)
        mixer = self.specs["mixer"]["name"].rpartition(":")[2].lower() if "mixer" in self.specs else None
        return Metrics(
            self.output,
            self.pool.names,
            self.max_steps,
            is_writer=self.parallel_info.is_main,
            mixer_name=mixer,
            selection_folder=files_of(self),
            scoreboard_folder=boards_of(self),
            tensorboard=writer,
            progress_bar=self.bar,
        )

    def _evaluate(self, engine: Any) -> dict[str, float]:
        """Token-mean loss of each evaluation set, under Trainer's names, and its exponential."""
        from dataflex_mega.signals.computer import evaluate

        found = {}
        for name, pool in self.evaluation.items():
            loss, tokens = (self.collectives.all_reduce_sum(part).sum() for part in evaluate(self._signal_computer(engine, pool)))
            mean = float(loss / tokens.clamp(min=1))
            prefix = f"eval_{name}" if name else "eval"
            found[f"{prefix}_loss"] = mean
            found[f"{prefix}_perplexity"] = math.exp(min(mean, LARGEST_EXPONENT))
        return found

    def _finish(self, engine: Any, trainer: Any) -> None:
        """The model in Hugging Face layout, and pictures."""
        engine.export(self.output)
        if not self.parallel_info.is_main:
            return
        from dataflex_mega.plots import plot_run
        from dataflex_mega.run.averages import write_averages
        from dataflex_mega.types import Averages

        self.tokenizer_module["tokenizer"].save_pretrained(self.output)
        if self.args.finetuning.plot_loss:
            trainer.hooks.plot_loss()
        if isinstance(self.roles.mixer, Averages):
            write_averages(self.output, self.specs["mixer"]["name"], self.pool.names, self.roles.mixer)
        pictures = plot_run(self.output)
        self.say(f"done: {self.max_steps} steps; model and logs in {self.output}", *(f"plot: {p}" for p in pictures))


def parameters_of(algorithm: Any) -> dict[str, Any]:
    """The values that an algorithm was made with, but for where it writes files."""
    return {f.name: getattr(algorithm, f.name) for f in fields(algorithm) if f.init and f.name != "cache_dir"}
