"""The folders `checkpoint-N` of an output_dir: whose they are, which may go, and how they go.

Only a folder with this program's manifest, or with the files of a damaged one, is ever removed or replaced. Anything else
of that name belongs to another tool.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dataflex_mega.checkpoint_format import (
    ENGINE,
    STATE,
    TENSORS,
    UNREADABLE,
    VERSION,
    Damaged,
    Manifest,
    read_state,
)
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import REPLACED, remove_tree, rename_durably, restore_replaced

PREFIX, WRITING, REMOVING = "checkpoint-", ".writing-checkpoint-", ".removing-checkpoint-"
NUMBERED = re.compile(rf"{PREFIX}(0|[1-9][0-9]*)", re.ASCII)
LEFTOVER = re.compile(rf"({re.escape(WRITING)}|{re.escape(REMOVING)})[0-9]+", re.ASCII)
# File patterns that only another tool writes into a checkpoint -> the tool.
FOREIGN_FILES = {
    "trainer_state.json": "LLaMA-Factory's or Hugging Face's trainer",
    "training_args.bin": "LLaMA-Factory's or Hugging Face's trainer",
    "optimizer.pt": "LLaMA-Factory's or Hugging Face's trainer",
    "rng_state*.pth": "LLaMA-Factory's or Hugging Face's trainer",
    "zero_to_fp32.py": "DeepSpeed",
    "global_step*": "DeepSpeed",
    "latest_checkpointed_iteration.txt": "Megatron-LM",
    "iter_*": "Megatron-LM",
    "common.pt": "Megatron-LM",
    "adapter_config.json": "Hugging Face (an adapter)",
    "adapter_model.*": "Hugging Face (an adapter)",
    "model*.safetensors*": "Hugging Face (a model)",
    "pytorch_model*.bin*": "Hugging Face (a model)",
}
# Names of our own layout; a folder without a readable manifest is a damaged one of ours with two of them.
OWN_FILES = (STATE, TENSORS, ENGINE, "rng-0.safetensors")


@dataclass(frozen=True)
class CheckpointFolder:
    """One `checkpoint-N` of an output_dir, as a look at it tells, its files not read.

    Attributes:
        step: the N of its name.
        manifest: None unless it is one of this program with a readable manifest.
        fault: why one of this program cannot be used; None for others.
        foreign: whose it is; None for one of this program.
    """

    path: Path
    step: int
    manifest: Manifest | None = None
    fault: str | None = None
    foreign: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether this program wrote it, whole or damaged."""
        return self.foreign is None

    @property
    def is_usable(self) -> bool:
        """Whether it may be read, counted and removed, as far as can be told without reading its files."""
        return self.manifest is not None and self.fault is None and not self.path.is_symlink()

    @property
    def is_model_only(self) -> bool:
        """Whether no run can continue from it: `save_only_model` was set."""
        return self.manifest is not None and not self.manifest.resumable

    @property
    def is_renamed(self) -> bool:
        """Whether it is a copy, or one whose name was changed: its step is not that of its name."""
        return self.manifest is not None and recorded_step(self) not in (self.step, None)

    @property
    def may_be_replaced(self) -> bool:
        """Whether a checkpoint of the same step may take its name: a copy under another name never gives way."""
        return self.is_own and not self.path.is_symlink() and not self.is_renamed


def inspect(path: Path) -> CheckpointFolder:
    """Look at a folder named checkpoint-N."""
    step = int(path.name.removeprefix(PREFIX))
    if not path.is_dir():
        return CheckpointFolder(path, step, foreign="no folder")
    try:
        manifest = Manifest.read(path)
    except Damaged as damage:
        if not has_own_files(path):
            return CheckpointFolder(path, step, foreign=foreign_tool(path) or "another program")
        return CheckpointFolder(path, step, fault=str(damage))
    found = CheckpointFolder(path, step, manifest)
    recorded = recorded_step(found)
    if recorded is not None and recorded != step:
        return CheckpointFolder(path, step, manifest, f"holds step {recorded}, so it is a copy or was renamed")
    faults = manifest.faults(path, sorted(manifest.files), contents=False)
    return CheckpointFolder(path, step, manifest, faults[0] if faults else None)


def has_own_files(path: Path) -> bool:
    """Whether a folder without a usable manifest is one of this program. It may hold a Hugging Face model too, so what
    another tool would have written speaks against it only where nothing else speaks for it."""
    count = sum(os.path.lexists(path / name) for name in OWN_FILES)
    return count > 2 or (count == 2 and (foreign_tool(path) is None or _has_own_state(path)))


def _has_own_state(path: Path) -> bool:
    try:
        content = json.loads((path / STATE).read_bytes())
    except UNREADABLE:
        return False
    return isinstance(content, dict) and {"version", "identity", "plan"} <= set(content)


def recorded_step(found: CheckpointFolder) -> int | None:
    """The step that a checkpoint says it was written at; None when nothing says it."""
    if found.manifest is None or found.manifest.version == VERSION:
        return None if found.manifest is None else found.manifest.step
    try:
        return int(json.loads((found.path / STATE).read_bytes())["step"])
    except (*UNREADABLE, KeyError, TypeError):
        return None


def survey(folder: Path) -> list[CheckpointFolder]:
    """All `checkpoint-N` in a folder, by step; other names are nobody's business."""
    if not folder.is_dir():
        return []
    return sorted((inspect(p) for p in folder.iterdir() if NUMBERED.fullmatch(p.name)), key=lambda found: found.step)


def foreign_tool(path: Path, default: str | None = None) -> str | None:
    """Which other tool wrote into a folder, by its files; None (or `default`, when it is not empty) without a sign."""
    for pattern, tool in FOREIGN_FILES.items():
        if any(path.glob(pattern)):
            return tool
    return default or None


def find_superseded(found: Collection[CheckpointFolder]) -> set[Path]:
    """Checkpoints that a later start made void, but that a kill or a power failure left where they are."""
    void = {digest for one in found if one.is_usable and one.manifest for digest in one.manifest.lineage.supersedes}
    return {one.path for one in found if one.manifest is not None and one.manifest.digest in void}


def choose_for_removal(
    found: Collection[CheckpointFolder],
    step: int,
    limit: int | None,
    kept: Collection[Path],
    best: Path | None = None,
) -> list[Path]:
    """What `save_total_limit` removes after the checkpoint of `step` was written: whole ones of this program below it, the
    oldest first, none of `kept`. Damaged ones and those of other tools are not counted.

    `best`, an absolute path, stays and is counted, so that there is room for one fewer of the others.
    """
    if not limit or limit < 1:
        return []
    below = [one.path for one in found if one.is_usable and one.step < step]
    others = [path for path in below if path.resolve() != best]
    room = max(0, limit - 1 - (len(below) - len(others)))
    return [path for path in others[: max(0, len(others) - room)] if path.resolve() not in kept]


def remove(path: Path) -> None:
    """Remove a checkpoint: it loses its name first, so a kill leaves no half of one."""
    removing = path.with_name(REMOVING + path.name.removeprefix(PREFIX))
    remove_tree(removing)
    rename_durably(path, removing)
    remove_tree(removing)


def recover(folder: Path) -> None:
    """Bring `folder` to the state before or after what a killed run was doing. Only the holder of its lock may do that."""
    for path in folder.iterdir():
        if not path.is_dir() or path.is_symlink():
            continue
        if LEFTOVER.fullmatch(path.name):
            remove_tree(path)
        elif path.name.startswith(REPLACED) and NUMBERED.fullmatch(path.name.removeprefix(REPLACED)):
            restore_replaced(folder / path.name.removeprefix(REPLACED))


def step_of(path: Path, manifest: Manifest) -> int:
    """The step of a checkpoint anywhere. Raises CheckpointError when it is named as that of another step."""
    step = manifest.step if manifest.step is not None else int(read_state(path)["step"])
    name = path.resolve().name
    if NUMBERED.fullmatch(name) and name != f"{PREFIX}{step}":
        raise CheckpointError(f"{path} holds step {step}: it is a copy or was renamed; give it a name that says so")
    return step
