"""A checkpoint -> a folder of a Hugging Face model or adapter, in one process on the CPU.

What the checkpoint holds in that layout is copied. Otherwise the model is built as its configuration says and filled from
the engine's files. Every file is compared with the manifest first. Nothing is unpickled, and no code that a checkpoint names
is executed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dataflex_mega.checkpoint_folder as checkpoint_folder
from dataflex_mega.checkpoint_format import (
    ENGINE,
    MANIFEST,
    SINGLE_FILE,
    SINGLE_INDEX,
    STATE,
    TENSORS,
    Damaged,
    Manifest,
    read_state,
)
from dataflex_mega.config.model_record import MODEL_KEYS
from dataflex_mega.config.parse import RunConfig, parse_config
from dataflex_mega.distributed.parallel_info import process_group_scope
from dataflex_mega.errors import CheckpointError, ConfigError, did_you_mean
from dataflex_mega.files import fsync_file, remove_tree, replace_folder, temporary_path
from dataflex_mega.llamafactory import args as lf_args
from dataflex_mega.llamafactory.merge import merged_model
from dataflex_mega.llamafactory.model import load_tokenizer
from dataflex_mega.llamafactory.model_checks import check_model
from dataflex_mega.run.checkpoint_contents import TRAINER_STATE
from dataflex_mega.run.engines import engine_factory

ADAPTER, MODEL = "adapter_config.json", "config.json"
NOT_OF_A_MODEL = (STATE, TENSORS, MANIFEST, TRAINER_STATE, "training_args.bin")
# Keys that the command takes beside those of the configuration. A checkpoint cannot ask for foreign code, only its user.
OPTIONS = ("merge", "trust_remote_code")
QUANTIZATION = ("quantization_bit", "quantization_method", "quantization_type", "double_quantization")


@dataclass(frozen=True)
class Exported:
    """What was written, in words for the user."""

    folder: Path
    what: str


def export_checkpoint(checkpoint: Path, target: Path, options: Mapping[str, Any]) -> Exported:
    """Write the model or adapter of a checkpoint into `target`, which is missing or empty.

    Args:
        options: `merge` (an adapter into its model), `trust_remote_code`, and keys that replace those of the configuration,
            such as model_name_or_path where the model has moved.

    Raises:
        CheckpointError: no whole checkpoint. ConfigError: a wrong option, target or model.
    """
    _check_options(options)
    _check_target(checkpoint, target)
    manifest = verified(checkpoint)
    names = model_files(manifest)
    with _new_folder(target) as folder:
        if names:
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
                if manifest.files[name].size:
                    fsync_file(folder / name)
        else:
            _export_state(checkpoint, folder, options)
        is_adapter = (folder / ADAPTER).is_file()
        if is_adapter and options.get("merge"):
            _merge(checkpoint, folder, options)
    if is_adapter:
        return Exported(target, "the adapter, merged into its model" if options.get("merge") else "the adapter")
    return Exported(target, "the model (there is no adapter to merge)" if options.get("merge") else "the model")


def verified(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are as they were written. Raises CheckpointError, with what to name
    instead where that can be told."""
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"export: {checkpoint} is not a folder; expected a checkpoint, such as saves/run/checkpoint-100"
        )
    try:
        manifest = Manifest.read(checkpoint)
    except Damaged as damage:
        inside = [one.path.name for one in checkpoint_folder.survey(checkpoint) if one.is_own]
        if inside:
            raise CheckpointError(
                f"export: {checkpoint} is no checkpoint; name one of {', '.join(inside)} in it"
            ) from None
        tool = checkpoint_folder.foreign_tool(checkpoint)
        if tool is not None and not checkpoint_folder.has_own_files(checkpoint):
            raise CheckpointError(
                f"export: {checkpoint} is of {tool}, not a checkpoint of dataflex_mega, and in its own layout already; "
                "dataflex-cli export model_name_or_path=BASE adapter_name_or_path=FOLDER template=NAME export_dir=OUT "
                "merges an adapter"
            ) from None
        raise CheckpointError(f"export: {checkpoint} is no whole checkpoint: {damage}") from None
    faults = manifest.faults(checkpoint, sorted(manifest.files))
    if faults:
        raise CheckpointError(f"export: {checkpoint} is damaged: {faults[0]}")
    return manifest


def model_files(manifest: Manifest) -> list[str]:
    """The files of a checkpoint that are a Hugging Face model or adapter and its tokenizer; none without a model."""
    names = [
        name
        for name in sorted(manifest.files)
        if name not in NOT_OF_A_MODEL and not name.startswith((f"{ENGINE}/", "rng-"))
    ]
    if ADAPTER not in names and MODEL not in names:
        return []
    return [name for name in names if name != SINGLE_INDEX or SINGLE_FILE not in names]


def _check_options(options: Mapping[str, Any]) -> None:
    known = [*OPTIONS, *sorted(MODEL_KEYS)]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"export: unknown key {key!r}{did_you_mean(key, known)}; there are merge and the model's keys"
            )
        if key in OPTIONS and not isinstance(value, bool):
            raise ConfigError(f"{key}: expected true or false, found {value!r}")


def _check_target(checkpoint: Path, target: Path) -> None:
    if target.resolve().is_relative_to(checkpoint.resolve()):
        raise ConfigError(f"export: {target} is inside {checkpoint}; name another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"export: {target} is there already; name a folder that is missing or empty")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that gets its name when the block ends; after an exception nothing is left."""
    writing = temporary_path(target)
    try:
        writing.mkdir(parents=True)
        yield writing
        replace_folder(writing, target)
    finally:
        remove_tree(writing)


# -- building the model ------------------------------------------------------------------------------------------------


def recorded_keys(checkpoint: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that build the model of a checkpoint, those of the user before those that were stored."""
    saved = read_state(checkpoint)
    stored = saved.get("configuration") or saved["identity"]  # older checkpoints have only the latter
    keys = {key: value for key, value in stored.items() if key in MODEL_KEYS and value is not None}
    keys["engine"] = stored.get("engine") or "fsdp"
    keys.update((key, value) for key, value in options.items() if key != "merge")
    if not keys.get("model_name_or_path"):
        raise ConfigError(
            f"export: {checkpoint} does not say which model it was trained from; add model_name_or_path=FOLDER"
        )
    return keys


def _check_base(name: str) -> None:
    """Raises ConfigError for a folder that is not there; anything else may be a name on a hub."""
    path = Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ConfigError(
            f"export: the model {name}, from which the training began, is not there; model_name_or_path=FOLDER says where "
            "it is now"
        )


def _parsed(keys: Mapping[str, Any], folder: Path) -> tuple[RunConfig, Any]:
    """(the configuration, LLaMA-Factory's arguments) of a run that trains nothing on the CPU."""
    stage = "pt" if keys.get("stage") == "pt" else "sft"  # the model of other stages is built alike, from other data
    run = {"dataset": "none", "output_dir": str(folder / "none"), "mixer": "static", "stage": stage}
    config = parse_config({**keys, **run}, lf_args.argument_types())
    return config, lf_args.parse_arguments(lf_args.prepare_arguments({**config.llamafactory, "use_cpu": True}))


def _export_state(checkpoint: Path, folder: Path, options: Mapping[str, Any]) -> None:
    """Fill the model from the engine's files."""
    keys = recorded_keys(checkpoint, options)
    keys.pop("fp16", None)  # no CPU computes in it; the files say which precision is stored
    if keys["engine"] == "megatron":
        keys.pop("bf16", None)
    _check_base(str(keys["model_name_or_path"]))
    config, args = _parsed(keys, folder)
    factory = engine_factory(config)
    module, _ = load_tokenizer(args)
    check_model(args, module["tokenizer"], loads_weights=keys["engine"] != "megatron")
    with process_group_scope():
        builder = factory.init_processes(args, len(module["tokenizer"]))
        builder.export_state(module["tokenizer"], checkpoint / ENGINE, folder)
    _save_tokenizer(module, folder)


def _merge(checkpoint: Path, folder: Path, options: Mapping[str, Any]) -> None:
    """Replace the adapter in `folder` by its model with the adapter merged into it."""
    keys = {key: value for key, value in recorded_keys(checkpoint, options).items() if key not in QUANTIZATION}
    before = keys.get("adapter_name_or_path") or []
    names = [name.strip() for name in before.split(",")] if isinstance(before, str) else list(map(str, before))
    if names and not keys.pop("create_new_adapter", False):
        names.pop()  # training went on with it, so it is part of this one
    keys["adapter_name_or_path"] = ",".join([*names, str(folder)])
    for key in ("bf16", "fp16", "fsdp", "fsdp_config", "pissa_init", "pissa_iter"):
        keys.pop(key, None)
    _check_base(str(keys["model_name_or_path"]))
    _, args = _parsed(keys, folder)
    module, _ = load_tokenizer(args)
    check_model(args, module["tokenizer"])
    model = merged_model(args, module["tokenizer"])
    kept = {path.name for path in folder.iterdir() if path.name.startswith(("tokenizer", "chat_template", "processor"))}
    for path in folder.iterdir():
        if path.name not in kept:
            remove_tree(path)
    model.save_pretrained(folder)
    _save_tokenizer(module, folder)


def _save_tokenizer(module: Mapping[str, Any], folder: Path) -> None:
    for part in (module["tokenizer"], module.get("processor")):
        if part is not None:
            part.save_pretrained(folder)
