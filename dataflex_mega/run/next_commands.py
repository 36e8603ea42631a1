"""What can be done with the model that a run has written: the commands, as they are to be typed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dataflex_mega.run.checkpoint_contents import ADAPTERS

# Keys of a training that its model needs wherever it is loaded again, where they are set.
WITH_THE_MODEL = (
    "template", "trust_remote_code", "model_revision", "resize_vocab", "rope_scaling", "default_system", "enable_thinking",
)  # fmt: skip


def next_commands(keys: Mapping[str, Any], folder: Path) -> list[str]:
    """`chat: dataflex-cli chat ...` and so on, a line each; none for a model that answers no instructions.

    Args:
        keys: LLaMA-Factory's, of the training.
        folder: output_dir.
    """
    if keys.get("stage", "sft") != "sft" or not keys.get("template"):
        return []
    is_adapter = keys.get("finetuning_type", "lora") in ADAPTERS
    model = {"model_name_or_path": keys["model_name_or_path"] if is_adapter else folder}
    if is_adapter:
        before = keys.get("adapter_name_or_path") or []
        names = before.split(",") if isinstance(before, str) else list(before)
        kept = names if keys.get("create_new_adapter") else names[:-1]  # training went on with the last one
        model["adapter_name_or_path"] = ",".join(map(str, [*kept, folder]))
        if keys.get("finetuning_type") == "oft":
            model["finetuning_type"] = "oft"
    model |= {key: keys[key] for key in WITH_THE_MODEL if keys.get(key) not in (None, False)}
    arguments = " ".join(shlex.quote(f"{key}={_text(value)}") for key, value in model.items())
    commands = [f"{name}: dataflex-cli {name} {arguments}" for name in ("chat", "api")]
    if is_adapter:
        merged = shlex.quote(f"export_dir={folder}-merged")
        commands.append(f"export: dataflex-cli export {arguments} {merged}")
    return commands


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
