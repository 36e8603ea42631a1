"""Train with the real packages of four trackers, offline, and read the figures of the run back from what they have stored.

    python tools/trackers_test.py [--folder FOLDER] [--processes 1 2] [--keep]

An environment of its own sees the packages of the Python that runs this, torch among them, and gets wandb, mlflow, trackio
and swanlab beside them. One run for each number of processes reports to all four. Every logged loss, proportion, selection
and evaluation must be in each store, under one run, with the value that metrics.jsonl has, and no secret in any file. Needs
a package index; takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("wandb", "mlflow", "trackio", "swanlab")
SECRET = "hf_" + "0123456789abcdefghijklmnopqrstuvwxyz"
STEPS, EVERY, EVALUATED = 6, 2, 3

MAKE = """
import sys
from pathlib import Path
import yaml
from tests.support import corpus, runs
folder = corpus.write(Path(sys.argv[1]))
config = runs.base(
    folder, output_dir=str(folder / "out"), mixer="odm", selector="loss", weighter="loss", warmup_step=2, update_step=2,
    update_times=-1, max_steps=int(sys.argv[2]), logging_steps=int(sys.argv[3]), eval_dataset="code,prose",
    eval_on_each_dataset=True, eval_strategy="steps", eval_steps=int(sys.argv[4]), max_samples=40,
    per_device_train_batch_size=8 // int(sys.argv[5]), report_to=sys.argv[6].split(","), run_name="trial",
    hub_token=sys.argv[7],
)
(folder / "run.yaml").write_text(yaml.safe_dump(config))
"""

# Prints {tracker: [runs, {"name step": value}]}; runs in the environment that has the packages.
READ = r"""
import json, sqlite3, struct, sys
from pathlib import Path
folder = Path(sys.argv[1])

def records(path):  # LevelDB's log format after a header of 7 bytes
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        parts += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""

def wandb():
    from wandb.proto import wandb_internal_pb2 as proto
    files = list(folder.glob("wandb/wandb/offline-run-*/run-*.wandb"))
    for path in files:
        for raw in records(path):
            record = proto.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                for name, value in row.items():
                    yield name, row["train/global_step"], value
    yield None, len(files), None

def swanlab():
    from swanlab.proto.swanlab.record.v1 import record_pb2 as proto
    files = list(folder.glob("swanlab/run-*/run-*.swanlab"))
    for path in files:
        for raw in records(path):
            record = proto.Record()
            record.ParseFromString(raw)
            if record.HasField("scalar"):
                yield record.scalar.key, record.scalar.step, record.scalar.value.number
    yield None, len(files), None

def trackio():
    (path,) = folder.glob("trackio/*.db")
    database = sqlite3.connect(path)
    for text, in database.execute("select metrics from metrics"):
        row = json.loads(text)
        for name, value in row.items():
            yield name, row["train/global_step"], value
    yield None, database.execute("select count(distinct run_id) from metrics").fetchone()[0], None

def mlflow():
    database = sqlite3.connect(folder / "mlflow.db")
    for name, step, value in database.execute("select key, step, value from metrics"):
        short = name.removeprefix("eval_")
        yield ("eval/" if short != name else "train/") + short, step, value
    yield None, database.execute("select count(*) from runs where status = 'FINISHED'").fetchone()[0], None

found = {}
for read in (wandb, swanlab, trackio, mlflow):
    rows = list(read())
    values = {f"{name} {step}": value for name, step, value in rows if name is not None}
    found[read.__name__] = [next(step for name, step, _ in rows if name is None), values]
print(json.dumps(found))
"""


def make_environment(folder: Path) -> Path:
    """A virtual environment with the trackers -> its Python. What this Python has is seen there and not installed again."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder / "venv")])
        own = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(own) / "_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run([str(python), "-m", "pip", "install", "--quiet", "--progress-bar", "off", *PACKAGES])
    return python


def run(command: list[str], variables: dict[str, str] | None = None) -> str:
    """Run a command -> its standard output; its standard error is shown. Exits with the command's words when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(variables or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command[:6])} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def train(python: Path, folder: Path, processes: int) -> None:
    """One run that reports to all four, everything below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("wandb", "swanlab", "trackio"):
        (folder / name).mkdir(parents=True)
    numbers = [str(number) for number in (STEPS, EVERY, EVALUATED, processes)]
    run([str(python), "-c", MAKE, str(folder), *numbers, ",".join(PACKAGES), SECRET])
    offline = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    variables = {
        **offline, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder / "wandb"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "TRACKIO_DIR": str(folder / "trackio"), "SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": str(folder / "swanlab"),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    run([str(python), *launcher, "-m", "dataflex_mega.train", str(folder / "run.yaml")], variables)


def expected(folder: Path) -> dict[str, float]:
    """`name step` -> value, from metrics.jsonl and trainer_state.json, which no tracker writes."""
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    values = {}
    for step in range(EVERY, STEPS + 1, EVERY):
        window = rows[step - EVERY : step]
        values[f"train/loss {step}"] = sum(row["loss"] for row in window) / EVERY
        values |= {f"train/mix/{name} {step}": share for name, share in window[-1]["proportions"].items()}
        weights = window[-1].get("weights", {})  # none during a warm-up
        values |= {f"train/weight/{name} {step}": value for name, value in weights.items()}
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    for row in state["log_history"]:
        named = {name: value for name, value in row.items() if name.startswith("eval_")}
        values |= {f"eval/{name.removeprefix('eval_')} {row['step']}": value for name, value in named.items()}
    for path in (folder / "out" / "selections").glob("step_*.json"):
        chosen, step = len(json.loads(path.read_text())["indices"]), int(path.stem.removeprefix("step_"))
        values[f"train/select/size {step + EVERY}"] = chosen
    return values


def compare(python: Path, folder: Path, processes: int) -> bool:
    """Print a line for each tracker -> whether all have all."""
    good, wanted = True, expected(folder)
    for name, (runs, values) in sorted(json.loads(run([str(python), "-c", READ, str(folder)])).items()):
        wrong = [
            key
            for key, value in wanted.items()
            if abs(values.get(key, float("nan")) - value) > 1e-9 or key not in values
        ]
        own = [key for key in values if key.startswith(("train/memory/", "train/speed/"))]
        good = good and not wrong and runs == 1 and bool(own)
        told = f"missing or different: {', '.join(wrong[:5])}" if wrong else "all equal"
        print(
            f"{processes} processes, {name}: {runs} run, {len(wanted)} figures looked for, {len(values)} stored; {told}"
        )
    leaks = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.yaml" and SECRET.encode() in path.read_bytes()
    ]
    for path in leaks:
        print(f"a token is stored in {path}")
    return good and not leaks


def main() -> int:
    """Command line. Returns the exit status: 1 when a figure is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environment and the runs go; a temporary one otherwise")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="trackers-"))).resolve()
    python, good = make_environment(folder), True
    for processes in options.processes:
        train(python, folder / f"{processes}", processes)
        good = compare(python, folder / f"{processes}", processes) and good
    if not (options.keep or options.folder):
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
