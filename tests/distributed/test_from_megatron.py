"""Files of Megatron-LM become a corpus by a manifest beside them, and train."""

import json

import numpy as np
import pytest
import torch

from dataflex_mega import cli
from dataflex_mega.errors import DataError
from tests.support import corpus, runs
from tests.support.bad_inputs import check_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("megatron"))


def write(prefix, lengths=(100,) * 20, sentences=1, last=None):
    """As preprocess_data.py writes: documents of `sentences` sequences each."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix.parent.mkdir(exist_ok=True)
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        ids = torch.arange(5, 5 + length)
        if last is not None:
            ids[-1] = last
        builder.add_document(ids, [length // sentences] * sentences)
    builder.finalize(f"{prefix}.idx")


def test_a_manifest_makes_them_a_corpus_that_trains(folder, capsys):
    write(folder / "mg" / "web_text_document")
    write(folder / "mg" / "code_text_document", lengths=(60,) * 10, sentences=2)
    prefixes = [str(folder / "mg" / f"{name}_text_document") for name in ("web", "code")]
    assert cli.main(["corpus", "--from-megatron", *prefixes]) == 0
    said = capsys.readouterr()
    assert "10 documents in 20 sequences" in said.err and "train with corpus_dir" in said.out
    content = json.loads((folder / "mg" / "manifest.json").read_text())
    assert [(d["name"], d["documents"], d["tokens"]) for d in content["domains"]] == [
        ("web", 20, 2000),
        ("code", 20, 600),
    ]
    config = runs.base(
        folder, output_dir=str(folder / "out" / "mg"), corpus_dir=str(folder / "mg"), mixer="static", max_steps=2,
        dataset=None, dataset_dir=None,
    )  # fmt: skip
    status, stderr = runs.train_here(config)
    assert status == 0 and len(runs.rows(config)) == 2, stderr


def test_the_tokenizer_is_compared(folder, capsys):
    write(folder / "ids" / "a", lengths=(1000,))
    status = cli.main(["corpus", "--from-megatron", str(folder / "ids" / "a"), "--tokenizer", str(folder / "model")])
    check_line(status, capsys.readouterr().err, ["a.bin", "the id 1004", "512"])
    write(folder / "fits" / "a", last=7)
    status = cli.main(["corpus", "--from-megatron", f"web={folder}/fits/a.bin", "--tokenizer", str(folder / "model")])
    assert status == 0 and "--append-eod" in capsys.readouterr().err
    assert json.loads((folder / "fits" / "manifest.json").read_text())["domains"][0]["name"] == "web"
    from dataflex_mega.data import manifest

    class Small:
        def __len__(self):
            return 50

    cli.main(["corpus", "--from-megatron", f"{folder}/fits/a", "--overwrite"])
    with pytest.raises(DataError, match="the id 103"):
        manifest.check_tokenizer(manifest.read(folder / "fits"), Small())


def test_what_is_no_pair_of_files_is_named(folder, tmp_path, capsys):
    write(tmp_path / "x" / "a")
    prefix = tmp_path / "x" / "a"
    index, data = (tmp_path / "x" / "a.idx").read_bytes(), (tmp_path / "x" / "a.bin").read_bytes()
    write(tmp_path / "y" / "a")
    for arguments, idx, bin_, words in [
        ([str(tmp_path / "x" / "b")], index, data, ["b.idx", "not found", "a.idx"]),
        ([str(prefix)], index[:50], data, ["a.idx", "cut"]),
        ([str(prefix)], b"x" * 60, data, ["a.idx", "MMIDIDX"]),
        ([str(prefix)], index, data[:-2], ["a.bin", "bytes"]),
        ([str(prefix), f"z={tmp_path}/y/a"], index, data, ["y/a", "folder"]),
        ([str(prefix), str(prefix)], index, data, ["'a'", "NAME=PREFIX"]),
        ([str(prefix), "--dataset", "c"], index, data, ["--from-megatron"]),
    ]:
        (tmp_path / "x" / "a.idx").write_bytes(idx)
        (tmp_path / "x" / "a.bin").write_bytes(bin_)
        check_line(cli.main(["corpus", "--from-megatron", *arguments]), capsys.readouterr().err, words)
    (tmp_path / "x" / "manifest.json").write_text("{}")
    check_line(
        cli.main(["corpus", "--from-megatron", str(prefix)]), capsys.readouterr().err, ["manifest.json", "--overwrite"]
    )
