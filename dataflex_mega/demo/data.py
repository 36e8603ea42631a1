"""Make the demo data: four text domains and one instruction set, in LLaMA-Factory's format.

C4, Wikipedia and Alpaca come from LLaMA-Factory's source distribution, which pip downloads once into the cache; the
fourth domain is the source of the Python standard library that runs this script. Nothing is random: the same archive,
Python and options give the same bytes. Every domain holds out whole documents for validation, so no document is in both
training and evaluation. SOURCES.json and SOURCES.md beside the data name the source of each data set.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dataflex_mega.errors import DataError
from dataflex_mega.exit_status import OneLineParser, exit_status
from dataflex_mega.files import atomic_write
from dataflex_mega.setup.packages import last_error

FOLDER = Path(".demo")  # of a checkout; `dataflex-cli demo` is told another
ARCHIVE_FILES = {"c4": "data/c4_demo.jsonl", "wiki": "data/wiki_demo.txt", "alpaca": "data/alpaca_en_demo.json"}
ORIGIN = {
    "demo_c4": ("C4, the part that LLaMA-Factory ships", "ODC-BY 1.0; Common Crawl's terms of use apply too"),
    "demo_wiki": ("English Wikipedia articles that LLaMA-Factory ships", "CC BY-SA (Wikipedia's authors) and GFDL"),
    "demo_alpaca_text": ("Alpaca instructions that LLaMA-Factory ships, as plain text", "CC BY-NC 4.0"),
    "demo_python": ("Python standard library, .py files", "PSF License Agreement (Python's LICENSE)"),
    "demo_alpaca": ("the same Alpaca instructions, for supervised fine-tuning", "CC BY-NC 4.0"),
}
# Not library code: tests, data tables, applications, third-party packages, files of the build machine.
SKIPPED_FOLDERS = {
    "test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "distutils", "pydoc_data",
    "turtledemo", "ensurepip", "__phello__", "__pycache__", "lib-dynload",
}  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Options:
    """Options that determine the data besides the sources. Sizes are in characters."""

    piece: int = 2000  # longest row of text
    python_size: int = 1_600_000
    held_out: float = 0.08  # fraction of a domain's characters for validation, at least one document
    seed: int = 0


def shuffle_key(seed: int, name: str) -> str:
    """A sort key that shuffles documents; the same on every machine."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def split_text(text: str, limit: int) -> list[str]:
    """Split a text into pieces of about equal length, none over `limit` characters, whose concatenation is `text`.

    A piece ends after a blank line, a line, a sentence or a word, the first of these that occurs in its second half.
    """
    pieces = []
    while len(text) > limit:
        aim = -(-len(text) // -(-len(text) // limit))  # length / number of pieces, both rounded up
        end = min(limit, aim + aim // 8)
        for separator in ("\n\n", "\n", ". ", " "):
            position = text.rfind(separator, end // 2, end)
            if position >= 0:
                end = min(position + len(separator), limit)
                break
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text else pieces


def hold_out(documents: dict[str, Any], sizes: dict[str, int], options: Options) -> tuple[list[str], list[str]]:
    """Names of the (training, validation) documents, each in the given order; both have at least one."""
    if len(documents) < 2:
        raise DataError(f"a domain of {len(documents)} documents cannot be split; at least 2 are needed")
    target_size, held_out, size = options.held_out * sum(sizes.values()), set(), 0
    for name in sorted(documents, key=lambda name: shuffle_key(options.seed, name)):
        if len(held_out) < len(documents) - 1 and (not held_out or size + sizes[name] <= target_size):
            held_out.add(name)
            size += sizes[name]
    return [n for n in documents if n not in held_out], [n for n in documents if n in held_out]


def python_documents(stdlib: Path, options: Options) -> dict[str, str]:
    """Path below `stdlib` -> source text, of as many files as `python_size` allows, sorted by path."""
    paths: dict[str, Path] = {}
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).parts
        if SKIPPED_FOLDERS.isdisjoint(parts) and not any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            paths["/".join(parts)] = path
    documents: dict[str, str] = {}
    total = 0
    for name in sorted(paths, key=lambda name: shuffle_key(options.seed, name)):
        try:
            text = paths[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few library files are in other encodings on purpose
        if len(text) < 200 or total + len(text) > options.python_size:
            continue
        documents[name] = text
        total += len(text)
    if len(documents) < 2:
        raise DataError(f"{stdlib}: no Python source found; the standard library of this Python has no .py files")
    return dict(sorted(documents.items()))


def read_archive(archive: Path) -> dict[str, str]:
    """The three data files of a LLaMA-Factory source distribution as text. Raises DataError naming what is missing."""
    texts: dict[str, str] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inner = member.name.partition("/")[2]
                for key in (key for key, path in ARCHIVE_FILES.items() if path == inner):
                    stream = tar.extractfile(member)
                    texts[key] = stream.read().decode("utf-8") if stream else ""
    except (OSError, EOFError, tarfile.TarError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{archive}: not a readable source distribution ({error}); delete it and try again") from error
    for key, path in ARCHIVE_FILES.items():
        if not texts.get(key):
            raise DataError(f"{archive}: has no {path}; a source distribution of llamafactory is needed")
    return texts


def download(version: str, cache: Path) -> Path:
    """The source distribution of that llamafactory, from the cache or through pip. Raises DataError without either."""
    archive = cache / f"llamafactory-{version}.tar.gz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    # Only llamafactory itself is downloaded as source: with ":all:" pip would compile its build back end from source too.
    command = [*pip_command(), "download", "--quiet", "--no-deps", "--no-binary", "llamafactory"]
    command += ["--retries", "2", "--dest", str(cache), f"llamafactory=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not archive.exists():
        reason = last_error(done.stderr) if done.returncode != 0 else f"pip left no {archive.name}"
        raise DataError(
            f"llamafactory {version}: its source distribution could not be downloaded (pip: {reason}); "
            "connect to a package index or name a downloaded archive with --source"
        )
    return archive


def pip_command() -> list[str]:
    """The running interpreter's pip, or one that uv runs: uv itself downloads no archives."""
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is None and uv is not None:
        return [uv, "tool", "run", "--quiet", "pip"]
    return [sys.executable, "-m", "pip"]


def text_of(row: dict[str, str]) -> str:
    """An Alpaca row as running text."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    return f"{question}\n\n{row['output']}\n"


def datasets(texts: dict[str, str], python: dict[str, str], options: Options) -> dict[str, list[dict[str, str]]]:
    """Every data set's rows by name, training and validation."""
    alpaca = {str(n): row for n, row in enumerate(json.loads(texts["alpaca"]))}
    c4 = [json.loads(line)["text"] for line in texts["c4"].split("\n") if line]
    wiki = [line for line in texts["wiki"].split("\n") if line]
    domains = {
        "demo_c4": {str(n): text for n, text in enumerate(c4)},
        "demo_wiki": {str(n): text for n, text in enumerate(wiki)},
        "demo_alpaca_text": {n: text_of(row) for n, row in alpaca.items()},
        "demo_python": python,
    }
    result: dict[str, list[dict[str, str]]] = {}
    for name, documents in domains.items():
        sizes = {key: len(text) for key, text in documents.items()}
        for suffix, keys in zip(("", "_validation"), hold_out(documents, sizes, options), strict=True):
            pieces = (piece for key in keys for piece in split_text(documents[key], options.piece))
            result[name + suffix] = [{"text": piece} for piece in pieces if piece.strip()]
            if name == "demo_alpaca_text":
                result["demo_alpaca" + suffix] = [alpaca[key] for key in keys]
    return result


def fingerprint(options: Options, source: str) -> str:
    """A hash of all inputs: options, this file, Python's version, the archive's version or content."""
    parts = [repr(options), source, platform.python_version(), Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_current(output: Path, expected: str) -> bool:
    """Whether `output` holds exactly what SOURCES.json says was written with this fingerprint."""
    try:
        record = json.loads((output / "SOURCES.json").read_text(encoding="utf-8"))
        same = record["fingerprint"] == expected
        return same and all((output / d["file"]).stat().st_size == d["bytes"] for d in record["datasets"].values())
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return False


def write(output: Path, rows: dict[str, list[dict[str, str]]], record: dict[str, Any]) -> dict[str, Any]:
    """Write data sets, dataset_info.json and, last, SOURCES.md and SOURCES.json. Returns the record with the sizes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "SOURCES.json").unlink(missing_ok=True)
    info: dict[str, Any] = {}
    datasets_record: dict[str, Any] = {}
    for name, content in sorted(rows.items()):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
        atomic_write(output / f"{name}.jsonl", data)
        info[name] = {"file_name": f"{name}.jsonl"}
        if "text" in content[0]:
            info[name]["columns"] = {"prompt": "text"}
        origin, licence = ORIGIN[name.removesuffix("_validation")]
        datasets_record[name] = {"file": f"{name}.jsonl", "rows": len(content), "bytes": len(data)}
        datasets_record[name] |= {"sha256": hashlib.sha256(data).hexdigest(), "origin": origin, "licence": licence}
    record = {**record, "datasets": datasets_record}
    atomic_write(output / "dataset_info.json", json.dumps(info, indent=2) + "\n")
    atomic_write(output / "SOURCES.md", sources_page(record))
    atomic_write(output / "SOURCES.json", json.dumps(record, indent=2) + "\n")
    return record


def sources_page(record: dict[str, Any]) -> str:
    """The text of SOURCES.md: each data set, its source and its licence."""
    lines = [
        "# Where the demo data comes from",
        "",
        f"Written by dataflex_mega from {record['archive']} (sha256 {record['archive_sha256']})",
        f"and the standard library of Python {record['python']}. LLaMA-Factory's distribution is under Apache-2.0 and",
        "does not mention a licence of its demo data; the licences below are those that the publishers of the original",
        "data sets give. The data are for trying the library out: check the licences before you redistribute",
        "them.",
        "",
        "| data set | rows | bytes | taken from | licence |",
        "|---|---|---|---|---|",
    ]
    for name, d in record["datasets"].items():
        lines.append(f"| {name} | {d['rows']} | {d['bytes']} | {d['origin']} | {d['licence']} |")
    return "\n".join(lines) + "\n"


def table(record: dict[str, Any]) -> Iterable[str]:
    """The lines to print, one per data set."""
    yield f"{'data set':<30} {'rows':>6} {'KiB':>7}  licence"
    for name, d in record["datasets"].items():
        yield f"{name:<30} {d['rows']:>6} {d['bytes'] / 1024:>7.0f}  {d['licence']}"
    yield f"{'total':<30} {'':>6} {sum(d['bytes'] for d in record['datasets'].values()) / 1024:>7.0f}"


def run(output: Path, source: Path | None, options: Options, cache: Path) -> dict[str, Any] | None:
    """Write the data into `output` and return their record, or None when they are up to date. Raises DataError."""
    try:
        version = metadata.version("llamafactory")
    except metadata.PackageNotFoundError:
        raise DataError("llamafactory is not installed: run dataflex-cli setup") from None
    if source is not None and not source.is_file():
        raise DataError(f"--source {source}: no such file; a source distribution (.tar.gz) of llamafactory is needed")
    origin = version if source is None else hashlib.sha256(source.read_bytes()).hexdigest()
    key = fingerprint(options, origin)
    if is_current(output, key):
        return None
    archive = source or download(version, cache)
    texts = read_archive(archive)
    python = python_documents(Path(sysconfig.get_path("stdlib")), options)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    record = {"fingerprint": key, "archive": archive.name, "archive_sha256": digest}
    record["python"] = platform.python_version()
    return write(output, datasets(texts, python, options), record)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after one line that names the mistake."""
    return exit_status(lambda: make(argv))


def make(argv: list[str] | None) -> int:
    """Write the data that the command line asks for -> 0. Raises UserError."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER / "data", help="folder to write (.demo/data)")
    parser.add_argument("--source", type=Path, help="a downloaded llamafactory source distribution, instead of pip")
    parser.add_argument("--cache", type=Path, default=FOLDER / "cache", help="folder of the download (.demo/cache)")
    parser.add_argument("--seed", type=int, default=0, help="which documents are held out and which modules are read")
    args = parser.parse_args(argv)
    record = run(args.output, args.source, Options(seed=args.seed), args.cache)
    print(f"demo data {'is already in' if record is None else 'written to'} {args.output}")
    for line in table(record) if record else ():
        print(line)
    return 0
