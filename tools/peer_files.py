"""What becomes of other projects' training files with a role on: each runs, or is refused in one line.

    python tools/peer_files.py FOLDER ... --data DATA [--roles odm,weigh,select | own] [--only NAME] [--json FILE]

Every YAML below the folders that describes a training is run on the CPU as it stands, with only model, template, output,
paths and sizes changed, once for each role: `odm` adds `mixer: odm`, `weigh` adds `weighter: loss`, `select` adds
`selector: loss`, `own` leaves the roles that the file has. The datasets come from `--data`, a folder with dataset_info.json.
A table is printed: trains, refused (its one line), or what must not be: a traceback, a failure of several lines, a run that
does not end. It ends with status 1 when there is one of these.

    make demo-data
    python tools/peer_files.py LLaMA-Factory/examples --data LLaMA-Factory/data --roles odm,weigh,select
    python tools/peer_files.py DataFlex/examples --data DataFlex/data --roles own
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from tests.support import runs  # noqa: E402

ROLES: dict[str, dict[str, Any]] = {
    "own": {},
    "odm": {"mixer": "odm", "warmup_step": 1, "update_step": 1},
    "weigh": {"weighter": "loss", "warmup_step": 1},
    "select": {"selector": "loss", "warmup_step": 1, "update_step": 1, "update_times": 1},
}
# Key of a file -> its value here. A key that a file does not have stays away, but for those in GIVEN.
SIZES: dict[str, Any] = {
    "cutoff_len": 48, "max_samples": 12, "num_train_epochs": 1.0, "max_steps": 3, "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0, "save_steps": 2, "logging_steps": 1, "eval_steps": 2, "warmup_step": 2,
    "update_step": 1, "train_step": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 1, "max_new_tokens": 4, "ddp_timeout": 600,
}  # fmt: skip
STAND_INS = {
    "pt": ["c4_demo", "wiki_demo"], "sft": ["alpaca_en_demo", "alpaca_zh_demo", "identity"], "dpo": ["dpo_en_demo"],
    "rm": ["dpo_en_demo"], "kto": ["kto_en_demo"],
}  # fmt: skip
GIVEN = {"max_samples": 12, "cutoff_len": 48}
SECONDS = 240


@dataclass
class Outcome:
    """What became of a file under a role."""

    file: str
    role: str
    kind: str  # trains, refused, traceback, failed, hangs
    line: str = ""


def is_training(keys: Any) -> bool:
    """Whether a YAML describes a training of LLaMA-Factory's or DataFlex's."""
    if not isinstance(keys, dict) or "model_name_or_path" not in keys:
        return False
    return bool(keys.get("do_train")) or "train_type" in keys


def known_datasets(names: Any, stage: str, known: list[str]) -> str:
    """The file's datasets, those that `--data` does not have replaced by others for the stage."""
    stand_ins = [name for name in STAND_INS.get(stage, STAND_INS["sft"]) if name in known]
    asked = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    spare = iter([name for name in stand_ins if name not in asked])
    kept = [name if name in known else next(spare, None) for name in asked]
    return ",".join(name for name in kept if name)


def small(keys: dict[str, Any], role: str, model: Path, data: Path, output: Path) -> dict[str, Any]:
    """The file's keys with model, data, output and sizes of ours."""
    changed = {**keys, **{key: value for key, value in SIZES.items() if key in keys}}
    for key, value in GIVEN.items():
        if not keys.get("streaming"):
            changed[key] = value
    if "train_type" not in keys or "train_step" not in keys:
        changed.setdefault("max_steps", 3)
    changed.update(
        model_name_or_path=str(model), template="default", dataset_dir=str(data), output_dir=str(output), use_cpu=True
    )
    known = list(json.loads((data / "dataset_info.json").read_text()))
    for key in ("dataset", "eval_dataset"):
        if keys.get(key):
            changed[key] = known_datasets(keys[key], str(keys.get("stage", "sft")), known)
    changed.update(ROLES[role])
    return changed


def with_reference_model(config: dict[str, Any], start: Path, model: Path, folder: Path) -> dict[str, Any]:
    """The configuration with a copy of its components file in which DoReMi's reference model is the tiny one."""
    components = start / str(config.get("components_cfg_file") or "")
    if not components.is_file():
        return config
    copy = folder / "components.yaml"
    copy.write_text(re.sub(r"(?m)^(\s*reference_model_path:) .*$", rf"\1 {model}", components.read_text()))
    return {**config, "components_cfg_file": str(copy)}


def outcome_of(status: int | None, stderr: str) -> tuple[str, str]:
    """Exit status and standard error -> (kind, the line that says why)."""
    lines = [line for line in stderr.splitlines() if line.startswith("dataflex")]
    errors = [line for line in lines if "error" in line.lower()] or stderr.splitlines()[-1:]
    if status is None:
        return "hangs", f"did not end in {SECONDS} s"
    if "Traceback (most recent call last)" in stderr:
        return "traceback", stderr.strip().splitlines()[-1]
    if status == 0:
        return "trains", ""
    return ("refused" if status == 2 else "failed"), (errors[-1] if errors else f"status {status}")


def run_file(path: Path, name: str, role: str, arguments: argparse.Namespace, folder: Path) -> Outcome:
    """Train one file with one role."""
    keys = yaml.safe_load(path.read_text())
    output = folder / role / name.replace("/", "_").removesuffix(".yaml") / "out"
    output.mkdir(parents=True)
    model, start = arguments.model.resolve(), arguments.start.resolve()
    config = small(keys, role, model, arguments.data.resolve(), output)
    config = with_reference_model(config, start, model, output.parent)
    before = Path.cwd()
    os.chdir(start)  # relative names of other files in it
    try:
        processes = runs.start(config, 1)
    finally:
        os.chdir(before)
    status = runs.finish(processes, SECONDS)[0]
    if status is None:
        runs.kill(processes)
    errors = runs.stderr_of(config, 0)
    text = errors.read_text() if errors.is_file() else ""
    return Outcome(name, role, *outcome_of(status, text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / ".demo" / "model")
    parser.add_argument("--start", type=Path, help="the folder in which a file's relative paths start")
    parser.add_argument("--roles", default="odm,weigh,select")
    parser.add_argument("--only", default="", help="a part of the names of the files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    arguments.start = arguments.start or arguments.folders[0].parent
    outcomes = []
    with tempfile.TemporaryDirectory() as temporary:
        for top in arguments.folders:
            for path in sorted(top.rglob("*.yaml")):
                name = str(path.relative_to(top))
                try:
                    found = is_training(yaml.safe_load(path.read_text()))
                except yaml.YAMLError:
                    continue
                if not found or arguments.only not in name:
                    continue
                for role in arguments.roles.split(","):
                    outcomes.append(run_file(path, name, role, arguments, Path(temporary)))
                    print(f"{outcomes[-1].kind:9} {role:6} {name}  {outcomes[-1].line}", flush=True)
    print(dict(Counter(outcome.kind for outcome in outcomes)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(any(outcome.kind not in ("trains", "refused") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
