"""Cost of preparing a corpus: tokens per second with one and two workers, and peak memory by the size of the input.

The input is Python's standard library, repeated to the requested size, in JSON lines of two domains; the tokenizer is
trained on it. Every run is a process of its own; its peak memory is the most that it and its workers hold at one time.
The budget is on memory: four times the input, at most 1.1 times the peak.

    python tools/bench/corpus.py --mb 16
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def tiny_model() -> ModuleType:
    """tools/tiny_model.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "tools" / "tiny_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def texts() -> list[str]:
    """Modules of the standard library in pieces of at most 8,000 characters."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = [path.read_text(encoding="utf-8") for path in sorted(stdlib.glob("*.py"))]
    return [text[start : start + 8000] for text in modules for start in range(0, len(text), 8000)]


def write(path: Path, size: int, documents: list[str]) -> None:
    """Write about `size` bytes of rows."""
    number = written = 0
    with path.open("w", encoding="utf-8") as stream:
        while written < size:
            row = {"text": documents[number % len(documents)], "set": ("even", "odd")[number % 2]}
            written += stream.write(json.dumps(row) + "\n")
            number += 1


class Memory(threading.Thread):
    """Watches a process and its descendants; `peak` is the most that they hold at one time, in MiB, shared pages once."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak = 0.0
        self.cpu: dict[int, float] = {}  # process -> seconds

    def run(self) -> None:
        while (family := self.family()) and Path(f"/proc/{self.pid}").exists():
            self.peak = max(self.peak, sum(self.note(pid) for pid in family) / 1024)
            time.sleep(0.05)

    def family(self) -> list[int]:
        """The process and its descendants."""
        pids, queue = [], [self.pid]
        while queue:
            pid = queue.pop()
            pids.append(pid)
            children = Path(f"/proc/{pid}/task/{pid}/children")
            if children.exists():
                queue += [int(child) for child in self.read(children).split()]
        return pids

    def note(self, pid: int) -> int:
        """Remember the processor time so far -> KiB resident now, a shared page in equal parts to those who share it."""
        fields = self.read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
        if fields:
            self.cpu[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        lines = self.read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def read(self, path: Path) -> str:
        """The text of a file of /proc, empty when its process is gone."""
        try:
            return path.read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return ""


def measure(folder: Path, source: Path, workers: int, unit_mb: float) -> tuple[int, float, float, float]:
    """(tokens, seconds, processor seconds, peak MiB) of one run."""
    output = folder / f"{source.stem}-{workers}"
    command = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py"), str(source), "--domain-field", "set"]
    options = ["--workers", str(workers), "--unit-mb", str(unit_mb), "--tokenizer", str(folder / "model")]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *options, "--output", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    memory = Memory(process.pid)
    memory.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    memory.join()
    if status:
        raise SystemExit(f"prepare_corpus.py ended with {status}")
    tokens = sum(domain["tokens"] for domain in json.loads((output / "manifest.json").read_text())["domains"])
    return tokens, seconds, sum(memory.cpu.values()), memory.peak


def main() -> None:
    """Print one line per run, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=16, help="size of the smaller input, MiB (16)")
    parser.add_argument("--unit-mb", type=float, default=1, help="input of a unit of work, MiB (1)")
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary of the tokenizer (8192)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, documents, maker = Path(name), texts(), tiny_model()
        maker.make_tokenizer(documents[:2000], options.vocab).save_pretrained(folder / "model")
        results = {}
        print(
            f"{'input MiB':>10}{'workers':>9}{'tokens':>14}{'seconds':>9}{'tokens/s':>12}{'/cpu-s':>12}{'peak MiB':>10}"
        )
        for times in (1, 4):
            source = folder / f"x{times}.jsonl"
            write(source, int(options.mb * times * (1 << 20)), documents)
            for workers in (1, 2):
                tokens, seconds, cpu, peak = results[times, workers] = measure(folder, source, workers, options.unit_mb)
                print(
                    f"{options.mb * times:>10.0f}{workers:>9}{tokens:>14,}{seconds:>9.1f}"
                    f"{tokens / seconds:>12,.0f}{tokens / cpu:>12,.0f}{peak:>10.0f}"
                )
    for workers in (1, 2):
        print(
            f"peak on x4 / peak on x1, {workers} workers: {results[4, workers][3] / results[1, workers][3]:.3f} (budget 1.1)"
        )
    rates = [(results[4, w][0] - results[1, w][0]) / (results[4, w][1] - results[1, w][1]) for w in (1, 2)]
    print(
        f"tokens/s beyond the start, two workers / one: {rates[1]:,.0f} / {rates[0]:,.0f} = {rates[1] / rates[0]:.2f}"
    )


if __name__ == "__main__":
    main()
