"""The third stage of a run: the pool of training samples, the evaluation sets, and how samples become batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import dataflex_mega.data.targets as targets
from dataflex_mega.algorithms.base import Algorithm
from dataflex_mega.data.collate import collate
from dataflex_mega.data.pairs import collate_pairs
from dataflex_mega.data.pool import Domain, ReferenceLosses, SamplePool
from dataflex_mega.distributed.agreement import run_on_main, waited_lock
from dataflex_mega.engines.base import Engine
from dataflex_mega.errors import ConfigError, DataError, UserError
from dataflex_mega.files import remove_if_empty, temporary_path
from dataflex_mega.llamafactory import tokenized
from dataflex_mega.llamafactory.data import DataBundle, make_bundle, tokenize
from dataflex_mega.llamafactory.tokenized import TokenizedData
from dataflex_mega.locks import FolderLock
from dataflex_mega.providers.context import SignalContext, split_targets
from dataflex_mega.providers.registry import display_name, needs_targets
from dataflex_mega.run import corpus
from dataflex_mega.run.media import media_collator, packs_rows
from dataflex_mega.run.offline_files import check_files
from dataflex_mega.run.preference import has_pairs
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.session import Session
from dataflex_mega.types import Batch


@dataclass(frozen=True)
class RunData:
    """The data of a run. `collate(samples, pack_length=...)` makes a batch."""

    pool: SamplePool
    evaluation: Mapping[str, SamplePool]  # evaluation sets by name; one without a name is ""
    collate: Callable[..., Batch]

    @classmethod
    def load(cls, session: Session, roles: RunRoles) -> RunData:
        """Read and tokenize. Raises UserError for missing target samples and for files that belong to other data."""
        config, args = session.config, session.args
        if config.dataflex.corpus_dir is not None:
            bundle, notes = corpus.load(config, args, session.tokenizer)
            session.report(*notes)
        else:
            try:
                bundle = make_bundle(_tokenized(session), args)
            except DataError as error:
                raise DataError(session.original_names(str(error))) from error
            notes = (session.original_names(f"note: {note}") for note in bundle.notes)
            session.report(*notes, *check_rows(bundle, int(args.data.cutoff_len)))
        pool = SamplePool(bundle.domains)
        evaluation = {name: SamplePool([Domain(name or "eval", rows)]) for name, rows in bundle.evaluation.items()}
        check_targets(roles, evaluation)
        check_files(roles, pool)
        pad_id = session.tokenizer.pad_token_id if session.tokenizer.pad_token_id is not None else 0
        pack_length = args.data.cutoff_len if packs_rows(args) else None
        if has_pairs(args):
            for name, kinds in bundle.media.items():
                raise ConfigError(f"stage: dpo takes text alone, dataset {name!r} has {' and '.join(kinds)}")
            return cls(pool, evaluation, partial(collate_pairs, pad_id=pad_id))
        make_batch = media_collator(session, roles, bundle, pad_id)
        return cls(pool, evaluation, make_batch or partial(collate, pad_id=pad_id, pack_length=pack_length))

    def with_references(self, losses: ReferenceLosses | None) -> RunData:
        """The same data with token losses of a reference model beside the samples."""
        return self if losses is None else replace(self, pool=self.pool.with_references(losses))

    def signal_context(self, session: Session, engine: Engine) -> SignalContext:
        """What providers of signals may use."""
        return SignalContext(
            parallel_info=session.parallel_info,
            collectives=session.collectives,
            pool=self.pool,
            evaluation=self.evaluation,
            collate=self.collate,
            batch_size=session.score_batch_size,
            seed=session.data_seed,
            engine=engine,
            tokenizer=session.tokenizer,
            output_dir=session.output_dir,
            cutoff_len=session.args.data.cutoff_len,
            report=session.report,
        )


def _tokenized(session: Session) -> TokenizedData:
    """The datasets, tokenized or read from tokenized_path, which is written where it is not there yet."""
    args, tokenizer, collectives = session.args, session.tokenizer, session.collectives
    path = args.data.tokenized_path
    if path is None:
        return tokenize(args, session.tokenizer_module, session.template)
    there = partial(tokenized.is_saved, path)
    if run_on_main(collectives, there):
        return tokenized.load(args, tokenizer)
    data = tokenize(args, session.tokenizer_module, session.template)
    target = Path(path).expanduser()
    lock = FolderLock(target.with_name(f".{target.name}.writing"))
    with waited_lock(collectives, lock, session.report):
        if not run_on_main(collectives, there):  # else another run has written it meanwhile
            run_on_main(
                collectives, lambda: tokenized.save(data, args, tokenizer, temporary_path(lock.folder / "rows"))
            )
            session.report(f"tokenized_path: {sum(map(len, data.train.values())):,} rows saved in {path}")
    run_on_main(collectives, partial(remove_if_empty, lock.folder))
    return data


def check_rows(bundle: DataBundle, cutoff_len: int) -> list[str]:
    """What a run says of its data. Raises DataError for a dataset or an evaluation set of which no row has a target."""
    training = {domain.name: targets.count_targets(domain.rows) for domain in bundle.domains}
    whole = ",".join(bundle.eval_names)
    held_out = {name or whole: targets.count_targets(rows) for name, rows in bundle.evaluation.items()}
    notes = targets.check_targets("dataset", training, cutoff_len)
    notes += targets.check_targets("eval_dataset", held_out, cutoff_len)
    return [*targets.summary(training), *(f"note: {note}" for note in notes)]


def check_targets(roles: RunRoles, evaluation: Mapping[str, SamplePool]) -> None:
    """Raises UserError when an algorithm compares with target samples and there are none, ConfigError for tasks that do not
    fit the evaluation sets."""
    for role, algorithm in roles.active_algorithms():
        if needs_targets(algorithm) and not evaluation:
            raise UserError(
                f"eval_dataset: {role} {_name(roles, role, algorithm)} needs target samples there (or val_size)"
            )
        for request in algorithm.requests():
            boundaries = getattr(request, "task_boundaries", None)
            if boundaries is not None:
                try:
                    split_targets(list(evaluation.values()), boundaries)
                except ConfigError as error:
                    raise ConfigError(f"{role}.{_name(roles, role, algorithm)}.{error}") from error


def _name(roles: RunRoles, role: str, algorithm: Algorithm) -> str:
    return display_name(algorithm) if role == "selector" else str(roles.specs[role]["name"])
