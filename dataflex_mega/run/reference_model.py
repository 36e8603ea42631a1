"""What reference_model may name: a Hugging Face model, an adapter, or a checkpoint of a run with a role."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dataflex_mega.checkpoint_format import MANIFEST, Damaged, Manifest
from dataflex_mega.distributed.agreement import run_on_main
from dataflex_mega.errors import ConfigError
from dataflex_mega.files import remove_tree, temporary_path
from dataflex_mega.run.export import ADAPTER, MODEL
from dataflex_mega.run.session import Session
from dataflex_mega.store.reference_losses import model_fingerprint

KEY = "reference_model"
# What torchrun tells its processes; the export is alone.
OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def fingerprint(source: Path) -> str:
    """16 digits that are others for another model. Raises ConfigError for a folder that holds none."""
    if (source / MODEL).is_file():
        return model_fingerprint(source)
    if is_adapter(source):
        base, sha = base_of(source), hashlib.sha256()
        for path in (source / ADAPTER, *sorted(source.glob("adapter_model.*"))):
            sha.update(path.read_bytes())
        sha.update((model_fingerprint(Path(base)) if Path(base).is_dir() else base).encode())
        return sha.hexdigest()[:16]
    return _checkpoint(source).digest[:16]


def is_adapter(source: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (source / ADAPTER).is_file() and not (source / MODEL).is_file()


def base_of(source: Path) -> str:
    """The folder or hub name of the model that an adapter was trained on. Raises ConfigError."""
    try:
        return str(json.loads((source / ADAPTER).read_bytes())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{KEY}: {source / ADAPTER} names no model that the adapter belongs to") from error


def _checkpoint(source: Path) -> Manifest:
    if not (source / MANIFEST).is_file():
        raise ConfigError(
            f"{KEY}: {source} is not a Hugging Face folder (no {MODEL}), no adapter and no checkpoint of a run with a role"
        )
    try:
        return Manifest.read(source)
    except Damaged as damage:
        raise ConfigError(f"{KEY}: {source} is damaged: {damage}") from damage


@contextmanager
def readable(session: Session, source: Path) -> Iterator[Path]:
    """`source`, or while the block runs a folder in output_dir with the model of a checkpoint that holds the engine's files
    only. Raises ConfigError on all processes when it cannot be exported."""
    if (source / MODEL).is_file() or is_adapter(source):
        yield source
        return
    target = run_on_main(session.collectives, partial(_export, session, source))
    try:
        yield target
        session.collectives.barrier()  # all have read it
    finally:
        if session.parallel_info.is_main:
            remove_tree(target)


def _export(session: Session, source: Path) -> Path:
    target = temporary_path(session.output_dir / "reference-model")
    session.report(f"{KEY}: writing the model of {source} as a Hugging Face folder")
    command = [sys.executable, "-m", "dataflex_mega", "export", str(source), str(target)]
    if session.args.model.trust_remote_code:
        command.append("trust_remote_code=true")
    environment = {name: value for name, value in os.environ.items() if name not in OF_THE_JOB}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        cause = (
            lines[-1].removeprefix("error: ") if lines else f"dataflex-cli export ended with status {done.returncode}"
        )
        raise ConfigError(f"{KEY}: {cause}")
    return target
