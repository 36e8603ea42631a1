"""From text files to a corpus: against concatenation by hand, megatron-core's own builder, and itself after a kill."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dataflex_mega.corpus import command
from dataflex_mega.data import manifest
from dataflex_mega.locks import LOCK_FILE, FolderLock
from tests.support import corpus as texts

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "prepare_corpus.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model/` and mixed.jsonl: real documents of three domains in turn, the domain in `meta.set`."""
    made = texts.write(tmp_path_factory.mktemp("corpus"))
    domains = texts.domains()
    rows = [
        {"text": documents[n], "meta": {"set": name}}
        for n in range(max(map(len, domains.values())))
        for name, documents in domains.items()
        if n < len(documents)
    ]
    (made / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def ids(folder):
    """text -> its tokens with the end token, by the plain way through transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return lambda text: [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def prepare(folder, output, *arguments):
    """Run the command in this process -> its exit status."""
    given = [*map(str, arguments), "--tokenizer", str(folder / "model"), "--output", str(output)]
    return command.main(given)


def stream(output, domain):
    """All tokens of a domain."""
    corpus = manifest.read(output)
    entry = corpus.pick([domain])[0]
    return np.fromfile(f"{corpus.prefix(entry)}.bin", dtype=corpus.dtype).tolist()


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


MIXED = ("--domain-field", "meta.set")


@pytest.fixture(scope="module")
def made(folder):
    """The corpus of mixed.jsonl, in units of 20 KB."""
    assert prepare(folder, folder / "made", folder / "mixed.jsonl", *MIXED, "--unit-mb", 0.02) == 0
    return folder / "made"


def test_a_domain_is_its_documents_in_order_with_an_end_token_each(made, ids):
    for name, documents in texts.domains().items():
        assert stream(made, name) == [token for text in documents for token in ids(text)]


def test_the_manifest_counts_documents_tokens_and_shares(made, folder, ids):
    corpus = manifest.read(made)
    sizes = {name: sum(len(ids(t)) for t in documents) for name, documents in texts.domains().items()}
    assert corpus.names == tuple(sorted(sizes)) and corpus.dtype == "uint16"
    for domain in corpus.domains:
        assert (domain.documents, domain.tokens) == (len(texts.domains()[domain.name]), sizes[domain.name])
        assert domain.proportion == pytest.approx(sizes[domain.name] / sum(sizes.values()))
    assert corpus.inputs == ({"path": str(folder / "mixed.jsonl"), "bytes": (folder / "mixed.jsonl").stat().st_size},)
    assert corpus.rows == sum(d.documents for d in corpus.domains) and corpus.bad_rows == 0


def test_checksums_are_those_of_sha256sum(made):
    import hashlib

    for domain in manifest.read(made).domains:
        for suffix, wanted in ((".bin", domain.bin_sha256), (".idx", domain.idx_sha256)):
            assert hashlib.sha256((made / (domain.prefix + suffix)).read_bytes()).hexdigest() == wanted


def test_the_files_are_byte_for_byte_what_megatron_core_writes_and_reads(made, tmp_path, ids):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    import torch

    documents = [ids(text) for text in texts.domains()["prose"]]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "prose.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "prose.idx"))
    for suffix in (".bin", ".idx"):
        assert (made / f"prose{suffix}").read_bytes() == (tmp_path / f"prose{suffix}").read_bytes()
    found = indexed.IndexedDataset(str(made / "prose"))
    assert [found[n].tolist() for n in range(len(found))] == documents


@pytest.mark.parametrize(("workers", "unit_mb"), [(1, 32), (2, 0.05), (2, 0.003)])
def test_workers_and_units_change_no_byte(made, folder, tmp_path, workers, unit_mb):
    output = tmp_path / "again"
    options = (*MIXED, "--workers", workers, "--unit-mb", unit_mb)
    assert prepare(folder, output, folder / "mixed.jsonl", *options) == 0
    assert contents(output) == contents(made)


def start(folder, output, *options):
    given = [str(folder / "mixed.jsonl"), *MIXED, "--tokenizer", str(folder / "model"), "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(TOOL), *given, *options], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(made, folder, tmp_path, workers):
    output, options = tmp_path / "killed", ("--unit-mb", "0.003", "--workers", str(workers))
    process = start(folder, output, *options)
    work, deadline = output / ".unfinished", time.monotonic() + 60
    while len(list(work.glob("*.json"))) < 4:  # job.json and three units
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / manifest.NAME).exists() and len(list(work.glob("*.json"))) < 60
    kept = {path: path.stat().st_mtime_ns for path in work.glob("0*.json")}
    (work / "9999999.tokens").write_bytes(b"half")
    assert kept
    process = start(folder, output, *options)
    heard = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, heard
    assert "was done before" in heard
    assert contents(output) == contents(made)


def test_a_run_that_is_killed_while_merging_goes_on(made, folder, tmp_path, monkeypatch, capsys):
    from dataflex_mega.corpus import merge

    written = []

    def third(self):
        written.append(self)
        if len(written) == 3:  # the second domain's .bin
            raise KeyboardInterrupt
        return finish(self)

    finish = merge._HashedFile.finish
    monkeypatch.setattr(merge._HashedFile, "finish", third)
    output = tmp_path / "merging"
    assert prepare(folder, output, folder / "mixed.jsonl", *MIXED) == 130
    assert "continues from here" in capsys.readouterr().err and not (output / manifest.NAME).exists()
    assert prepare(folder, output, folder / "mixed.jsonl", *MIXED) == 0
    assert len(written) == 7 and contents(output) == contents(made)  # the first domain was not written again


def test_what_is_there_already_is_left_alone_and_something_else_is_not_overwritten(made, folder, capsys):
    before = contents(made)
    assert prepare(folder, made, folder / "mixed.jsonl", *MIXED, "--unit-mb", 1) == 0
    assert "already in" in capsys.readouterr().out
    assert prepare(folder, made, folder / "mixed.jsonl", "--domain", "all") == 2
    assert "holds a corpus of other inputs or options; --overwrite replaces it" in capsys.readouterr().err
    assert contents(made) == before


def test_unfinished_work_on_an_input_that_has_changed_is_refused(folder, tmp_path, monkeypatch, capsys):
    from dataflex_mega.corpus import prepare as module

    file, output = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text('{"text": "one"}\n')
    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge_domains", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert prepare(folder, output, file, "--domain", "a") == 130
    file.write_text('{"text": "two"}\n')
    assert prepare(folder, output, file, "--domain", "a") == 2
    assert "an input has changed since; --overwrite starts anew" in capsys.readouterr().err
    assert prepare(folder, output, file, "--domain", "a", "--overwrite") == 0


def test_two_runs_into_one_folder_are_refused(folder, tmp_path, capsys):
    output = tmp_path / "out"
    lock = FolderLock(output)
    assert lock.try_acquire() is None
    assert prepare(folder, output, folder / "mixed.jsonl", *MIXED) == 2
    lock.release()
    message = capsys.readouterr().err
    assert "another process is writing" in message and f"process {os.getpid()} on " in message
    assert prepare(folder, output, folder / "mixed.jsonl", *MIXED) == 0
    assert not (output / LOCK_FILE).exists()


# -- bad rows ----------------------------------------------------------------------------------------------------------

BAD = {
    2: ('{"text": "cut', "not JSON"),
    4: ('{"meta": {"set": "a"}}', "no field 'text'"),
    5: ('{"text": "  \\n", "meta": {"set": "a"}}', "field 'text' is empty"),
    6: ('{"text": "no domain", "meta": {}}', "no field 'meta.set', which names the domain"),
    8: ('{"text": 5, "meta": {"set": "a"}}', "field 'text': expected text, found int"),
    9: ("[1, 2]", "expected an object, found list"),
    10: ("", "an empty line"),
    11: ('{"text": "\\ud800", "meta": {"set": "a"}}', "half of a surrogate pair"),
    12: ('{"text": "x", "meta": {"set": 3}}', "expected the name of a domain, found 3"),
    13: ("[" * 100_000, "not JSON"),
    14: ('{"text": "' + "long " * 60_000 + '", "meta": {"set": "a"}}', "longer than 209715 bytes"),
    15: ("{\xff}", "not"),
}


@pytest.mark.parametrize("unit_mb", [1, 0.0001])
def test_every_bad_row_is_named_by_file_and_line(folder, tmp_path, ids, capsys, unit_mb):
    lines = [BAD[n][0] if n in BAD else json.dumps({"text": f"row {n}", "meta": {"set": "a"}}) for n in range(1, 18)]
    (tmp_path / "bad.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    options = ("--max-bad", 1, "--unit-mb", unit_mb, "--longest-mb", 0.2)
    assert prepare(folder, tmp_path / "out", tmp_path / "bad.jsonl", *MIXED, *options) == 0
    found = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["line"] for row in found} == set(BAD) and len(found) == len(BAD)
    for row in found:
        assert row["file"] == str(tmp_path / "bad.jsonl") and BAD[row["line"]][1] in row["problem"]
    good = [n for n in range(1, 18) if n not in BAD]
    assert stream(tmp_path / "out", "a") == [token for n in good for token in ids(f"row {n}")]
    shown = capsys.readouterr().out
    assert "rows 17, bad 12" in shown and f"1 x no field 'text'; first in {tmp_path / 'bad.jsonl'}, line 4" in shown


def test_too_many_bad_rows_stop_the_work_and_name_one(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n' * 3)
    assert prepare(folder, tmp_path / "out", tmp_path / "a.jsonl", "--domain", "a", "--max-bad", 0.4) == 2
    heard = capsys.readouterr().err
    assert f"3 of 6 rows are bad, more than --max-bad 0.4 allows; one is {tmp_path / 'a.jsonl'}, line 2" in heard
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(folder, tmp_path / "out", tmp_path / "a.jsonl", "--domain", "a", "--max-bad", 0.5) == 0


def test_many_bad_rows_stop_the_work_before_the_end(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 3000 + "{}\n" * 2000 + '{"text": "good"}\n' * 300_000)
    assert prepare(folder, tmp_path / "out", tmp_path / "a.jsonl", "--domain", "a", "--unit-mb", 0.01) == 2
    heard = capsys.readouterr().err
    line = int(heard.split("line ")[1])
    assert 3000 < line <= 5000 and "rows are bad" in heard
    assert len(list((tmp_path / "out" / ".unfinished").glob("0*.json"))) < 20  # of 500


def test_an_input_without_a_usable_row_is_refused(folder, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    assert prepare(folder, tmp_path / "out", tmp_path / "a.jsonl", "--domain", "a", "--max-bad", 1) == 2
    assert "no usable row in 1 files" in capsys.readouterr().err


# -- formats -----------------------------------------------------------------------------------------------------------


def as_zst(path, data):
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as parallel compressors write them
    path.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))


def as_parquet(path, data):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [json.loads(line) for line in data.splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)


FORMATS = {
    "mixed.jsonl.zst": as_zst,
    "mixed.jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:])),
    "mixed.json": lambda path, data: path.write_bytes(b" [" + b",\n".join(data.splitlines()) + b" ]\n"),
    "lines.json": lambda path, data: path.write_bytes(data),
    "mixed.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(made, folder, tmp_path, name):
    FORMATS[name](tmp_path / name, (folder / "mixed.jsonl").read_bytes())
    assert prepare(folder, tmp_path / "out", tmp_path / name, *MIXED, "--unit-mb", 0.01) == 0
    for domain in texts.domains():
        for suffix in (".bin", ".idx"):
            file = domain + suffix
            assert (tmp_path / "out" / file).read_bytes() == (made / file).read_bytes()


@pytest.mark.parametrize("name", ["mixed.jsonl.zst", "mixed.jsonl.gz"])
def test_compressed_data_that_is_cut_short_or_damaged_is_an_error(folder, tmp_path, capsys, name):
    FORMATS[name](tmp_path / name, (folder / "mixed.jsonl").read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    assert prepare(folder, tmp_path / "out", tmp_path / name, *MIXED) == 2
    assert f"{name}: the {name.rpartition('.')[2]} data ends in the middle" in capsys.readouterr().err
    (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    assert prepare(folder, tmp_path / "other", tmp_path / name, *MIXED) == 2
    assert f"{name}: damaged" in capsys.readouterr().err


def test_a_broken_array_names_the_row_and_a_bad_row_of_parquet_its_number(folder, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"} {"text": "three"}]')
    assert prepare(folder, tmp_path / "out", tmp_path / "a.json", "--domain", "a") == 2
    assert "a.json, row 2: not JSON: expected ',', found '{'" in capsys.readouterr().err
    table = pyarrow.Table.from_pylist([{"text": "one"}, {"text": None}, {"text": "three"}])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    options = ("--domain", "a", "--max-bad", 1)
    assert prepare(folder, tmp_path / "out2", tmp_path / "a.parquet", *options, "--unit-mb", 0.00001) == 0
    found = json.loads((tmp_path / "out2" / "bad_rows.jsonl").read_text())
    assert found == {"file": str(tmp_path / "a.parquet"), "row": 1, "problem": "no field 'text'"}


def test_a_parquet_file_without_the_column_is_refused_before_any_work(folder, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"texts": "one"}]), tmp_path / "a.parquet")
    assert prepare(folder, tmp_path / "out", tmp_path / "a.parquet", "--domain", "a") == 2
    assert "no column 'text' (did you mean 'texts'?); it has texts" in capsys.readouterr().err


# -- inputs and options ------------------------------------------------------------------------------------------------


def test_llamafactory_datasets_are_domains_and_alpaca_rows_their_prompts(folder, tmp_path, ids):
    assert prepare(folder, tmp_path / "out", "--dataset", "code,sft", "--dataset-dir", folder / "data") == 0
    assert stream(tmp_path / "out", "code") == [t for text in texts.domains()["code"] for t in ids(text)]
    prompts = [row["instruction"] for row in texts.instructions()]
    assert stream(tmp_path / "out", "sft") == [token for text in prompts for token in ids(text)]


def test_folders_and_named_inputs(folder, tmp_path, ids):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, text in (("b.jsonl", "second"), ("a.jsonl", "first"), ("deep/c.jsonl", "third"), ("readme.md", "none")):
        (tmp_path / "in" / name).write_text(json.dumps({"body": text}) + "\n")
    (tmp_path / "x.jsonl").write_text('{"body": "other"}\n')
    options = (f"here={tmp_path / 'in'}", f"a/b={tmp_path / 'x.jsonl'}", "--text-field", "body")
    assert prepare(folder, tmp_path / "out", *options) == 0
    assert stream(tmp_path / "out", "here") == [t for text in ("first", "second", "third") for t in ids(text)]
    assert stream(tmp_path / "out", "a/b") == ids("other") and (tmp_path / "out" / "a_b.bin").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mixed.jsonl",), "whose domain? give --domain-field, --domain or NAME=PATH"),
        (("mixed.json", "--domain", "a"), "mixed.json not found (did you mean 'mixed.jsonl'?)"),
        (("mixed.jsonl", "--domain", "a", "--domain-field", "b"), "--domain, --domain-field: both are given"),
        (("mixed.jsonl", "mixed.jsonl", "--domain", "a"), "mixed.jsonl is an input 2 times"),
        (("mixed.jsonl", "--domain", "a", "--workers", "0"), "--workers: must be >= 1, found 0"),
        (("mixed.jsonl", "--domain", "a", "--max-bad", "2"), "--max-bad: must be from 0 to 1, found 2.0"),
        (("mixed.jsonl", "--domain", "a", "--unit-mb", "0"), "--unit-mb: must be > 0"),
        (("model/config.json.txt", "--domain", "a"), "not found"),
        (("model/config_.csv", "--domain", "a"), "expected a file that ends in .jsonl"),
        (("out_", "--domain", "a"), "no file in it ends in"),
        ((), "no input: name files or folders, or --dataset"),
        (("--dataset", "codes", "--dataset-dir", "data"), "--dataset: 'codes' is not in"),
        (("--dataset", "code", "--dataset-dir", "date"), "dataset_info.json not found"),
        (("mixed.jsonl", "--domain", "a", "--tokenizer", "nowhere"), "--tokenizer nowhere: "),
    ],
)
def test_a_users_mistake_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(folder)
    (folder / "model" / "config_.csv").write_text("x")
    (folder / "out_").mkdir(exist_ok=True)
    given = ["--tokenizer", "model", "--output", str(tmp_path / "out"), *arguments]
    assert command.main(given) == 2
    heard = capsys.readouterr().err.strip()
    assert words in heard and heard.startswith("error: ") and "\n" not in heard
