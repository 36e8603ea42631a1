"""The demo data: pieces, splits and files that depend on the seed alone, and bad sources."""

import hashlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dataflex_mega.errors import DataError

WORDS = "mixing domains of text while a small model trains on them and watching which one still teaches it".split()


def prose(rng: random.Random, characters: int) -> str:
    """Sentences and paragraphs, without a double quote or a line feed at the end."""
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choices(WORDS, k=rng.randint(3, 15))).capitalize() + rng.choice([". ", ".\n", ".\n\n"])
    return text[:characters].strip() + "."


@pytest.fixture(scope="module")
def demo(tool: Any) -> ModuleType:
    return tool("demo_data")


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    rng = random.Random(5)
    alpaca = [
        {
            "instruction": f"Task {n}: {prose(rng, 60)}",
            "input": prose(rng, 40) if n % 2 else "",
            "output": prose(rng, 300),
        }
        for n in range(40)
    ]
    return {
        "c4": [prose(rng, rng.choice([200, 900, 5000])) for _ in range(30)],
        "wiki": [prose(rng, rng.choice([1000, 20000])).replace("\n", " ") for _ in range(12)],
        "alpaca": alpaca,
    }


@pytest.fixture(scope="module")
def archive(sources: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("sdist") / "llamafactory-0.9.5.tar.gz", sources)


def write_archive(path: Path, sources: dict[str, Any], leave_out: str = "") -> Path:
    files = {
        "data/c4_demo.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in sources["c4"]),
        "data/wiki_demo.txt": "".join(text + "\n" for text in sources["wiki"]),
        "data/alpaca_en_demo.json": json.dumps(sources["alpaca"]),
        "src/data/c4_demo.jsonl": "not this one",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            if name != leave_out:
                info = tarfile.TarInfo(f"llamafactory-0.9.5/{name}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return path


def make(demo: ModuleType, archive: Path, output: Path, **options: Any) -> dict[str, Any] | None:
    return demo.run(output, archive, demo.Options(python_size=80_000, **options), output / "no-cache")


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("limit", [1, 7, 50, 2000])
def test_pieces_join_to_the_text_and_respect_the_limit(demo: ModuleType, limit: int) -> None:
    rng = random.Random(limit)
    for length in (0, 1, limit, limit + 1, 3 * limit + 2, 700):
        text = prose(rng, length) if length else ""
        pieces = demo.split_text(text, limit)
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= limit for piece in pieces)


def test_pieces_of_long_text_are_about_equal(demo: ModuleType) -> None:
    pieces = demo.split_text(prose(random.Random(1), 2100), 2000)
    assert len(pieces) == 2 and min(map(len, pieces)) > 700


def test_a_cut_prefers_paragraphs_over_lines_over_sentences_over_words(demo: ModuleType) -> None:
    text = "aaaa\n\nbb bb. bb\nb" + "c" * 14
    assert demo.split_text(text, 18)[0] == "aaaa\n\nbb bb. bb\n"  # the blank line is in the first half
    assert demo.split_text("aaaa bb\n\nbb bb" + "c" * 16, 18)[0] == "aaaa bb\n\n"
    assert demo.split_text("x" * 30, 20) == ["x" * 16, "x" * 14]


def test_split_keeps_order_and_parts_whole_documents(demo: ModuleType) -> None:
    sizes = {str(n): 100 + n for n in range(50)}
    train, held = demo.hold_out(sizes, sizes, demo.Options(held_out=0.1))
    assert sorted([*train, *held], key=int) == list(sizes) and not set(train) & set(held)
    assert train == sorted(train, key=int) and held == sorted(held, key=int)
    assert 0.05 < sum(sizes[n] for n in held) / sum(sizes.values()) <= 0.1
    assert held != demo.hold_out(sizes, sizes, demo.Options(held_out=0.1, seed=1))[1]


def test_split_always_leaves_something_on_both_sides(demo: ModuleType) -> None:
    for share in (0.0, 1.0):
        train, held = demo.hold_out({"a": 1, "b": 1}, {"a": 900, "b": 1}, demo.Options(held_out=share))
        assert len(train) == len(held) == 1
    with pytest.raises(DataError, match="1 documents cannot be split"):
        demo.hold_out({"a": 1}, {"a": 1}, demo.Options())


def test_two_runs_write_the_same_bytes_and_another_seed_does_not(
    demo: ModuleType, archive: Path, tmp_path: Path
) -> None:
    make(demo, archive, tmp_path / "a")
    make(demo, archive, tmp_path / "b")
    make(demo, archive, tmp_path / "c", seed=1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["demo_c4.jsonl"] != digests(tmp_path / "c")["demo_c4.jsonl"]


def test_every_document_is_whole_on_one_side(
    demo: ModuleType, archive: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    make(demo, archive, tmp_path)
    for name, documents in (("demo_wiki", sources["wiki"]), ("demo_c4", sources["c4"])):
        train = "".join(row["text"] for row in rows(tmp_path, name))
        held = "".join(row["text"] for row in rows(tmp_path, f"{name}_validation"))
        assert held and all((text in train) != (text in held) for text in documents)
        assert len(train) + len(held) == sum(map(len, documents))


def test_alpaca_rows_are_held_out_alike_as_text_and_as_instructions(
    demo: ModuleType, archive: Path, sources: dict[str, Any], tmp_path: Path
) -> None:
    make(demo, archive, tmp_path)
    for suffix in ("", "_validation"):
        instructions = rows(tmp_path, f"demo_alpaca{suffix}")
        text = "".join(row["text"] for row in rows(tmp_path, f"demo_alpaca_text{suffix}"))
        assert text == "".join(demo.text_of(row) for row in instructions)
        assert all(row in sources["alpaca"] for row in instructions)


def test_dataset_info_names_every_file_and_its_text_column(demo: ModuleType, archive: Path, tmp_path: Path) -> None:
    make(demo, archive, tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    domains = ("c4", "wiki", "alpaca_text", "python", "alpaca")
    assert set(info) == {f"demo_{d}{s}" for d in domains for s in ("", "_validation")}
    for name, entry in info.items():
        fields = set(rows(tmp_path, name)[0])
        text = entry.get("columns") == {"prompt": "text"}
        assert fields == ({"text"} if text else {"instruction", "input", "output"})


def test_the_record_says_rows_bytes_origin_and_licence(demo: ModuleType, archive: Path, tmp_path: Path) -> None:
    make(demo, archive, tmp_path)
    record = json.loads((tmp_path / "SOURCES.json").read_text())
    assert record["archive_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    page = (tmp_path / "SOURCES.md").read_text()
    for name, entry in record["datasets"].items():
        data = (tmp_path / entry["file"]).read_bytes()
        assert entry["bytes"] == len(data) and entry["rows"] == data.count(b"\n")
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["licence"] and f"| {name} | {entry['rows']} |" in page


def test_existing_data_are_kept_and_damaged_ones_made_anew(demo: ModuleType, archive: Path, tmp_path: Path) -> None:
    assert make(demo, archive, tmp_path) is not None
    before = digests(tmp_path)
    assert make(demo, archive, tmp_path) is None
    (tmp_path / "demo_wiki.jsonl").write_text("cut off")
    assert make(demo, archive, tmp_path) is not None
    assert digests(tmp_path) == before
    assert make(demo, archive, tmp_path, seed=1) is not None


def test_python_source_leaves_out_tests_other_encodings_and_what_exceeds_the_budget(
    demo: ModuleType, tmp_path: Path
) -> None:
    names = (
        "a.py",
        "b/c.py",
        "test/d.py",
        "b/tests/e.py",
        "site-packages/f.py",
        "config-3/g.py",
        "_sysconfigdata_x.py",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 40)
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n\xe9" * 20)
    (tmp_path / "short.py").write_text("pass\n")
    (tmp_path / "huge.py").write_text("x = 1\n" * 5000)
    assert list(demo.python_documents(tmp_path, demo.Options(python_size=10_000))) == ["a.py", "b/c.py"]
    with pytest.raises(DataError, match="no Python source found"):
        demo.python_documents(tmp_path / "site-packages", demo.Options())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_bad_sources_end_with_status_2_and_one_line(
    demo: ModuleType, archive: Path, sources: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "out")]
    assert demo.main([*output, "--source", str(tmp_path / "none.tar.gz")]) == 2
    assert "none.tar.gz: no such file" in one_line(capsys)

    partial = write_archive(tmp_path / "partial.tar.gz", sources, leave_out="data/wiki_demo.txt")
    assert demo.main([*output, "--source", str(partial)]) == 2
    assert "partial.tar.gz: has no data/wiki_demo.txt" in one_line(capsys)

    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(archive.read_bytes()[:3000])
    assert demo.main([*output, "--source", str(broken)]) == 2
    assert "broken.tar.gz: not a readable source distribution" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_no_network_ends_with_status_2_and_pips_reason(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(demo.subprocess, "run", no_network)
    assert demo.main(["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    message = one_line(capsys)
    assert "pip: ERROR: No matching distribution found" in message and "--source" in message


def test_without_llamafactory_the_command_that_installs_it_is_named(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise demo.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(demo.metadata, "version", absent)
    assert demo.main(["--output", str(tmp_path / "out")]) == 2
    assert one_line(capsys) == "error: llamafactory is not installed: run dataflex-cli setup\n"


def test_where_there_is_no_pip_uv_runs_one(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.pip_command() == [demo.sys.executable, "-m", "pip"]
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo.shutil, "which", lambda name: f"/bin/{name}")
    assert demo.pip_command() == ["/bin/uv", "tool", "run", "--quiet", "pip"]


def test_a_cached_archive_needs_no_pip(
    demo: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(demo.subprocess, "run", never)
    cached = tmp_path / "llamafactory-1.2.3.tar.gz"
    cached.write_bytes(archive.read_bytes())
    assert demo.download("1.2.3", tmp_path) == cached
