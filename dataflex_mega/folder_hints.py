"""What a folder holds that is not what its key expects, and what to do with it."""

from __future__ import annotations

from pathlib import Path

MODEL, ADAPTER, CHECKPOINT = "config.json", "adapter_config.json", "manifest.json"


def not_a_model(folder: Path) -> str:
    """For a message about a folder without config.json; empty when nothing can be told."""
    if (folder / ADAPTER).is_file():
        return "; it holds an adapter: name it in adapter_name_or_path, and its model here"
    return _not_exported(folder)


def not_an_adapter(folder: Path) -> str:
    """For a message about a folder without adapter_config.json; empty when nothing can be told."""
    if (folder / MODEL).is_file():
        return "; it holds a model: name it in model_name_or_path"
    return _not_exported(folder)


def _not_exported(folder: Path) -> str:
    if (folder / CHECKPOINT).is_file() and (folder / "state.json").is_file():
        return (
            f"; it is a checkpoint without the model in Hugging Face layout: dataflex-cli export {folder} OUT writes that, "
            "and save_hf_checkpoints: always keeps it in every checkpoint"
        )
    inside = sorted((path.name for path in folder.glob("checkpoint-*") if path.is_dir()), key=lambda n: (len(n), n))
    return f"; there is {inside[-1]} in it" if inside else ""
