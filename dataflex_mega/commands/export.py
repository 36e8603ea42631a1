"""`dataflex-cli export CHECKPOINT OUT`: a checkpoint as a folder of a Hugging Face model. With other arguments the command
is LLaMA-Factory's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dataflex_mega.errors import UserError

HELP = """usage: dataflex-cli export CHECKPOINT OUT [merge=true] [key=value ...]
       dataflex-cli export CONFIG.yaml [key=value ...]
       dataflex-cli export key=value ...

The first form writes the model or adapter of a checkpoint of a run with a role (saves/run/checkpoint-100, either engine) and
its tokenizer into the folder OUT, which is missing or empty. One process does it on the CPU, whatever layout has trained.
merge=true merges an adapter into its model. Where the model has moved since, model_name_or_path=FOLDER says where it is now;
a model with code of its own needs trust_remote_code=true. Every file is compared with the checkpoint's hashes first.

The other forms are LLaMA-Factory's export, with its keys."""

SUMMARY = "export CHECKPOINT OUT [merge=true]  the model or adapter of a checkpoint in Hugging Face layout"
HELP_ORDER = 76
HELP_WORDS = ("-h", "--help", "help")


def takes(arguments: Sequence[str]) -> bool:
    """Whether these arguments are of this command: two names, or a folder; no configuration and no keys."""
    if not arguments or "=" in arguments[0]:
        return False
    if arguments[0] in HELP_WORDS or Path(arguments[0]).is_dir():
        return True
    is_name = not arguments[0].startswith("-") and not arguments[0].endswith((".yaml", ".yml", ".json"))
    return is_name and len(arguments) > 1 and "=" not in arguments[1]


def main(argv: Sequence[str]) -> int:
    """Export -> 0. Raises UserError."""
    arguments = list(argv)
    if arguments[0] in HELP_WORDS:
        print(HELP)
        return 0
    if len(arguments) < 2 or "=" in arguments[1]:
        raise UserError(f"export: expected CHECKPOINT OUT, found {arguments[0]!r} alone; OUT is the folder to write")
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise UserError("export: runs in one process; start it without torchrun")
    from dataflex_mega.config.load import with_overrides

    options = with_overrides({}, arguments[2:])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a model of any size fits the memory of the machine, if anything
    try:
        from dataflex_mega.run.export import export_checkpoint

        exported = export_checkpoint(Path(arguments[0]).expanduser(), Path(arguments[1]).expanduser(), options)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    print(f"{exported.what}: {exported.folder}")
    return 0
