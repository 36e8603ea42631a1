"""Compressed files unpacked beside the cache, and what of a stream is kept, without LLaMA-Factory."""

import contextlib
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("datasets")

from dataflex_mega.errors import DataError
from dataflex_mega.llamafactory import local_rows
from dataflex_mega.llamafactory.args import LFArgs
from dataflex_mega.llamafactory.local_rows import StreamNeed

ROWS = [{"text": "a"}, {"text": "\u4e2d"}]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    (folder / "many").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for name in ("one.jsonl.gz", "many/a.jsonl.gz", "many/b.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(lines))
    (folder / "plain.jsonl").write_bytes(lines)
    files = {"one": "one.jsonl.gz", "many": "many", "plain": "plain.jsonl"}
    entries = {name: {"file_name": file, "columns": {"prompt": "text"}} for name, file in files.items()}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return folder


def arguments(data, dataset, **keys):
    values = {"dataset": dataset, "eval_dataset": None, "dataset_dir": str(data), "data_shared_file_system": False,
              "buffer_size": 4, "streaming": False}  # fmt: skip
    training = SimpleNamespace(main_process_first=lambda **_: contextlib.nullcontext(), seed=1)
    model = SimpleNamespace(cache_dir=str(data.parent / "cache"))
    return LFArgs(model, SimpleNamespace(**{**values, **keys}), training, None, None)


def entries(args):
    return json.loads((Path(args.data.dataset_dir) / "dataset_info.json").read_text())


def test_packed_files_are_unpacked_once_for_each_state(data):
    args = arguments(data, ["one", "plain"], eval_dataset=["many"])
    local = local_rows.unpack(args)
    found = entries(local.args)
    assert args.data.dataset_dir == str(data), "the arguments that were given stay"
    assert found["plain"]["file_name"] == str(data / "plain.jsonl") and found["one"]["columns"] == {"prompt": "text"}
    one, many = (Path(found[name]["file_name"]) for name in ("one", "many"))
    assert one.name == "one.jsonl" and sorted(path.name for path in many.iterdir()) == ["a.jsonl", "b.jsonl"]
    for file in (one, many / "a.jsonl"):
        assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == ROWS
    assert local.original_names(f"{one}, line 3") == f"{data}/one.jsonl.gz, line 3"
    before = one.stat().st_mtime_ns
    assert entries(local_rows.unpack(args).args) == found and one.stat().st_mtime_ns == before
    (data / "one.jsonl.gz").write_bytes(gzip.compress(b'{"text": "new"}\n'))
    assert entries(local_rows.unpack(args).args)["one"]["file_name"] != str(one)


def test_without_packed_files_nothing_changes(data):
    args = arguments(data, ["plain"])
    assert local_rows.unpack(args).args is args


@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_damaged_gz_is_one_line_and_leaves_nothing(data, damage):
    whole = (data / "one.jsonl.gz").read_bytes()
    content = {"cut": whole[:-9], "changed": whole[:-8] + bytes(8), "other": b"no gz"}[damage]
    (data / "one.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset 'one': \S+one.jsonl.gz is damaged gz data: ") as caught:
        local_rows.unpack(arguments(data, ["one"]))
    assert "\n" not in str(caught.value)
    assert not [path for path in (data.parent / "cache").rglob("*") if path.is_file()]


def test_a_folder_of_both_kinds_is_refused(data):
    (data / "many" / "c.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"holds a.jsonl.gz and c.jsonl; expected .gz files only, or none"):
        local_rows.unpack(arguments(data, ["many"]))


def test_the_folder_of_a_stream_is_that_of_its_files_seed_and_buffer(data, tmp_path):
    args = arguments(data, ["one"], streaming=True)
    folder = local_rows.stream_folder(args, tmp_path)
    assert folder == local_rows.stream_folder(arguments(data, ["one"]), tmp_path)
    assert folder != local_rows.stream_folder(arguments(data, ["one"], buffer_size=5), tmp_path)
    (data / "one.jsonl.gz").write_bytes(gzip.compress(b'{"text": "another one"}\n'))
    assert folder != local_rows.stream_folder(args, tmp_path)


def test_a_stream_is_kept_when_its_last_file_is_written(tmp_path):
    assert local_rows.read_kept(tmp_path) is None
    (tmp_path / "done.json").write_text('{"rows": 3, "tokens": null, "ended": true}')
    assert local_rows.read_kept(tmp_path) == StreamNeed(3, None, True)
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(DataError, match=r"streaming: \S+done.json cannot be read .*; remove"):
        local_rows.read_kept(tmp_path)
