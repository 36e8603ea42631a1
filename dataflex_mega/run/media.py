"""Runs whose datasets have images, videos or audio: how samples become batches, and what cannot be done with them."""

from __future__ import annotations

from dataflex_mega.engines.base import Engine
from dataflex_mega.engines.capabilities import Capability, capabilities_of, describe_missing
from dataflex_mega.engines.fsdp.language_model import check_only_tokens_train
from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory import predict
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.data import DataBundle
from dataflex_mega.llamafactory.media import MediaCollator, check_cut_rows
from dataflex_mega.llamafactory.model_checks import read_config
from dataflex_mega.llamafactory.processors import ImagesAlone, takes_media
from dataflex_mega.providers.registry import display_name, find_provider
from dataflex_mega.run.roles import RunRoles
from dataflex_mega.run.session import Session

OF_SAMPLES = frozenset({Capability.GRADIENT_SCORES, Capability.GRADIENT_FEATURES, Capability.POLICY_GRADIENTS})


def packs_rows(args: LFArgs) -> bool:
    """Whether samples share rows when a batch is made."""
    return args.finetuning.stage == "sft" and bool(args.data.packing or args.data.neat_packing)


def media_collator(session: Session, roles: RunRoles, bundle: DataBundle, pad_id: int) -> MediaCollator | None:
    """What makes batches of a run with images, videos or audio; None for text alone.

    Raises ConfigError where they cannot be trained, DataError for rows that end in the middle of them.
    """
    args, media = session.args, bundle.media
    if predict.is_requested(session.config.llamafactory) and isinstance(
        session.tokenizer_module["processor"], ImagesAlone
    ):
        raise ConfigError(
            "do_predict, predict_with_generate: LLaMA-Factory needs the whole processor of the model, whose part for videos "
            "needs torchvision; pip install 'dataflex_mega[vision]'"
        )
    if not media and not _trains_tower(session):
        return None
    for name, kinds in media.items():
        _check_run(session, name, " and ".join(kinds))
    _check_generation(roles, bundle)
    collator = MediaCollator.build(args, session.tokenizer_module, session.template, read_config(args), pad_id)
    sources = {domain.name: domain.rows for domain in bundle.domains}
    sources |= {name or "eval": rows for name, rows in bundle.evaluation.items()}
    for name in media:
        check_cut_rows(name, sources[name], collator, int(args.data.cutoff_len))
    return collator


def _trains_tower(session: Session) -> bool:
    """Whether layers train that text alone does not reach."""
    tuning = session.args.finetuning
    frozen = tuning.freeze_vision_tower and tuning.freeze_multi_modal_projector
    return not frozen and tuning.stage == "sft" and takes_media(session.template) and not packs_rows(session.args)


def _check_run(session: Session, name: str, kinds: str) -> None:
    """Raises ConfigError naming the key under which images, videos or audio cannot be trained."""
    args, engine = session.args, session.config.engine
    if Capability.MEDIA not in capabilities_of(engine):
        missing = describe_missing(frozenset({Capability.MEDIA}), engine)
        raise ConfigError(f"engine: {engine}: dataset {name!r} has {kinds}: {missing}")
    if args.finetuning.stage != "sft":
        raise ConfigError(f"stage: dataset {name!r} has {kinds}, which need stage: sft, found {args.finetuning.stage}")
    if packs_rows(args):
        raise ConfigError(
            f"packing: dataset {name!r} has {kinds}, whose rows cannot share one; use packing: false and neat_packing: false"
        )


def _check_generation(roles: RunRoles, bundle: DataBundle) -> None:
    targets = [name for name in bundle.media if name in {*bundle.evaluation, "eval"}]
    for role, needed in _needs(roles):
        if targets and Capability.GENERATION in needed:
            raise ConfigError(
                f"{role} generates answers to token ids alone, and evaluation set {targets[0]!r} has "
                f"{' and '.join(bundle.media[targets[0]])}; name an eval_dataset without them"
            )


def check_signals(roles: RunRoles, engine: Engine) -> None:
    """Raises ConfigError before the first step for gradients of samples of a model whose layers over images train."""
    if Capability.MEDIA in engine.capabilities and any(needed & OF_SAMPLES for _, needed in _needs(roles)):
        check_only_tokens_train(engine.model)


def _needs(roles: RunRoles) -> list[tuple[str, frozenset[str]]]:
    """(`selector less`, the capabilities that it needs of an engine) for each active algorithm."""
    found = []
    for role, algorithm in roles.active_algorithms():
        who = f"{role} {display_name(algorithm)}"
        needs = [find_provider(request, who).requires for request in algorithm.requests()]
        found.append((who, frozenset().union(*needs)))
    return found
