"""Whose `output_dir` is, this program's, another trainer's or nobody's, and what a new start does with a former run.

run.json      name of the run, and whether it is finished; written when training begins
.former-run/  logs of the run that overwrite_output_dir replaces, until the first checkpoint of the new one is whole
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dataflex_mega.checkpoint_folder as checkpoint_folder
from dataflex_mega.checkpoint_folder import CheckpointFolder
from dataflex_mega.checkpoint_format import UNREADABLE
from dataflex_mega.errors import CheckpointError
from dataflex_mega.files import atomic_write, fsync_directory, remove_tree, rename_durably
from dataflex_mega.log_files import is_own_log, read_rows
from dataflex_mega.metrics import ORDERS_FILE, STEPS_FILE

RUN_FILE, FORMER = "run.json", ".former-run"
FORMAT, VERSION = "dataflex_mega run", 1
# What a trainer leaves at the top of its output folder. A run of ours would overwrite most of these.
RUN_PATTERNS = (
    "trainer_state.json", "training_args.bin", "trainer_log.jsonl", "all_results.json", "train_results.json",
    "adapter_config.json", "adapter_model.*", "model*.safetensors*", "pytorch_model*.bin*", "optimizer.pt",
    "global_step*", "zero_to_fp32.py", "latest_checkpointed_iteration.txt", "iter_*", "common.pt",
)  # fmt: skip
FORMER_LOGS = (
    STEPS_FILE, ORDERS_FILE, "*_weights.jsonl", "trainer_log.jsonl", "times.jsonl", "trainer_state.json",
    "selections/step_*.json", RUN_FILE,
)  # fmt: skip
REMEDY = "choose another output_dir, or move it away"


@dataclass(frozen=True)
class RunRecord:
    """`run.json`. `run` is also in the checkpoints' lineage; `finished`: trained to its end, results written."""

    run: str
    finished: bool

    def write(self, folder: Path) -> None:
        """Write it into output_dir."""
        content = {"format": FORMAT, "version": VERSION, "run": self.run, "finished": self.finished}
        atomic_write(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """None when there is none that this program wrote."""
        try:
            content = json.loads((folder / RUN_FILE).read_bytes())
        except UNREADABLE:
            return None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return None
        return cls(str(content.get("run")), content.get("finished") is True)


def refuse_other_runs(keys: dict[str, Any]) -> None:
    """Raises CheckpointError when output_dir holds the run of another trainer, whose files this run would replace. It reads
    only, so every process may ask. `keys`: those of the configuration."""
    folder = Path(str(keys.get("output_dir") or ""))
    if "output_dir" not in keys or not folder.is_dir():
        return
    found = checkpoint_folder.survey(folder)
    if is_own_run(folder, found):
        return
    theirs = [one for one in found if not one.is_own]
    if theirs:
        names = ", ".join(one.path.name for one in theirs[:3]) + (", ..." if len(theirs) > 3 else "")
        tool = theirs[0].foreign
        raise CheckpointError(
            f"output_dir: {folder} holds {names} of {tool}, which this run leaves alone and cannot continue; {REMEDY}"
        )
    files = {path.name for pattern in RUN_PATTERNS for path in folder.glob(pattern)}
    files |= {name for name in (STEPS_FILE, ORDERS_FILE) if (folder / name).is_file() and not is_own_log(folder / name)}
    if files:
        raise CheckpointError(
            f"output_dir: {folder} holds {', '.join(sorted(files)[:3])} of another training or model, which this run would "
            f"replace; {REMEDY}"
        )


def refuse_own_run(keys: dict[str, Any]) -> None:
    """Raises CheckpointError when output_dir holds checkpoints of this program, which LLaMA-Factory's trainer, `train_type:
    static`, would take for its own: it cannot continue from them and would remove them."""
    folder = Path(str(keys.get("output_dir") or ""))
    own = [one.path.name for one in checkpoint_folder.survey(folder) if one.is_own]
    if "output_dir" in keys and own:
        raise CheckpointError(
            f"output_dir: {folder} holds {', '.join(own[:3])} of a run with a role, which static training cannot continue; "
            f"{REMEDY}"
        )


def is_own_run(folder: Path, found: list[CheckpointFolder]) -> bool:
    """Whether a run of this program has written into a folder."""
    if any(one.is_own for one in found) or RunRecord.read(folder) is not None:
        return True
    if RunRecord.read(folder / FORMER) is not None:
        return True
    return any("proportions" in row and "objective" in row for row in read_rows(folder / STEPS_FILE)[:8])


def set_former_logs_aside(folder: Path) -> None:
    """Move the logs of the run that is being replaced into a folder of their own, so that it could still be continued."""
    former = folder / FORMER
    if RunRecord.read(former) is not None:
        return  # of the run whose checkpoints are still there; what lies in `folder` now has no checkpoint
    record = RunRecord.read(folder)
    for name in _log_names(folder):
        if not os.path.lexists(former / name):
            (former / name).parent.mkdir(parents=True, exist_ok=True)
            rename_durably(folder / name, former / name)
    if former.is_dir():
        (record or RunRecord("", finished=True)).write(former)  # now the move is complete
        fsync_directory(folder)


def restore_former_logs(folder: Path) -> None:
    """Bring back the logs of a run that was to be replaced, over those of one that has not reached a checkpoint."""
    former = folder / FORMER
    if not former.is_dir():
        return
    for path in sorted(path for path in former.rglob("*") if not path.is_dir()):
        target = folder / path.relative_to(former)
        target.parent.mkdir(parents=True, exist_ok=True)
        rename_durably(path, target)
    remove_tree(former)


def _log_names(folder: Path) -> list[Path]:
    """The logs of a run of this program, relative to its output_dir; those of others under similar names stay."""
    found = sorted({path for pattern in FORMER_LOGS for path in folder.glob(pattern) if path.is_file()})
    return [path.relative_to(folder) for path in found if is_own_log(path) and path.name != RUN_FILE]
