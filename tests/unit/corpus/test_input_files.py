"""Dividing inputs into units, and reading their rows, without a tokenizer."""

import gzip
import json

import pytest

from dataflex_mega.corpus.input_files import FieldRule, extract, lookup, open_input, read_rows
from dataflex_mega.corpus.prepare import file_names, plan_units
from dataflex_mega.errors import DataError


def test_file_names_of_domains_are_plain_and_distinct():
    names = file_names(["a/b", "a_b", "A_B", "../..", "c d", "\u4e2d"])
    assert list(names.values()) == ["a_b", "a_b-2", "A_B-3", "_", "c_d", "_-2"]


def test_small_files_share_a_unit_and_large_ones_are_divided(tmp_path):
    sizes = (10, 10, 95, 10)
    files = []
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.jsonl").write_bytes(b"x" * size)
        files.append(open_input(tmp_path / f"{number}.jsonl", FieldRule(domain="d")))
    units = plan_units(files, 40)
    shown = [[(p.number, p.start, p.stop) for p in unit.slices] for unit in units]
    assert shown == [[(0, 0, 10), (1, 0, 10)], [(2, 0, 40)], [(2, 40, 80)], [(2, 80, 95), (3, 0, 10)]]
    assert [unit.number for unit in units] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_every_line_is_read_once_however_the_file_is_divided(tmp_path, size):
    texts = ["", "a", "bb" * 20, "\u4e2d\u6587", "c" * 5, "last"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(json.dumps({"text": t}).encode() for t in texts))
    file = open_input(tmp_path / "a.jsonl", FieldRule(domain="d"))
    slices = [file_slice for unit in plan_units([file], size) for file_slice in unit.slices]
    found = [row.value["text"] for file_slice in slices for row in read_rows(file_slice, 1 << 20)]
    assert found == texts


@pytest.mark.parametrize("size", [1, 13, 1000])
def test_a_line_that_is_too_long_is_one_bad_row_however_the_file_is_divided(tmp_path, size):
    lines = ['{"text": "a"}', '{"text": "' + "b" * 90 + '"}', '{"text": "c"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    file = open_input(tmp_path / "a.jsonl", FieldRule(domain="d"))
    slices = [file_slice for unit in plan_units([file], size) for file_slice in unit.slices]
    found = [row for file_slice in slices for row in read_rows(file_slice, 50)]
    assert [row.problem or row.value["text"] for row in found] == ["a", "longer than 50 bytes", "c"]


def test_an_array_is_read_element_by_element_whatever_lies_between_them(tmp_path):
    rows = [{"text": "x" * size, "n": [size, {"deep": "]"}]} for size in (0, 10, 200_000, 3, 500_000)]
    (tmp_path / "a.json").write_text("\n [" + " ,\n\t".join(map(json.dumps, rows)) + "\n]\n")
    file = open_input(tmp_path / "a.json", FieldRule(domain="d"))
    file_slice = plan_units([file], 10)[0].slices[0]
    assert file.kind == "json" and [row.value for row in read_rows(file_slice, 1 << 20)] == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}', "row 1: not JSON: the array does not end"),
        ('[{"a": 1},', "row 1: not JSON: "),
        ('[{"a": }]', "row 0: not JSON: "),
        ('[{"a": "' + "b" * 5000 + '"', "row 0: not JSON: "),
    ],
)
def test_a_broken_array_names_its_row(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    file_slice = plan_units([open_input(tmp_path / "a.json", FieldRule(domain="d"))], 10)[0].slices[0]
    with pytest.raises(DataError, match=words):
        list(read_rows(file_slice, 1000))


def test_fields_are_found_by_their_whole_name_or_by_its_parts():
    assert lookup({"a": {"b": {"c": 1}}}, "a.b.c") == 1 and lookup({"a.b": 2, "a": {"b": 3}}, "a.b") == 2
    assert lookup({"a": 5}, "a.b") is None and lookup({}, "a") is None


def test_the_texts_of_several_fields_are_joined_by_a_newline_and_the_first_must_be_there():
    rule = FieldRule(("ask", "about"), "d")
    assert extract({"ask": "one", "about": "two"}, rule) == ("one\ntwo", "d")
    assert extract({"ask": "one", "about": ""}, rule) == extract({"ask": "one"}, rule) == ("one", "d")
    assert extract({"about": "two"}, rule) == "no field 'ask'"


ROWS = [{"text": "first"}, {"text": "\u4e2d\u6587"}, {"text": "last"}]
CONTENTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS), ".json": json.dumps(ROWS),
    ".txt": "first\n\n\u4e2d\u6587\r\nlast",
}  # fmt: skip


def packed(name, text):
    data = text.encode()
    if name.endswith(".gz"):
        return gzip.compress(data)
    return pytest.importorskip("zstandard").compress(data) if name.endswith(("zst", "zstd")) else data


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", CONTENTS)
def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path, suffix, compression):
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(packed(path.name, CONTENTS[suffix]))
    file = open_input(path, FieldRule(domain="d"))
    slices = [file_slice for unit in plan_units([file], 1 << 20) for file_slice in unit.slices]
    assert [row.value for file_slice in slices for row in read_rows(file_slice, 1 << 20)] == ROWS


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize("damage", ["cut", "changed", "none of it"])
def test_damaged_gz_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}.gz"
    data = packed(path.name, CONTENTS[suffix])
    path.write_bytes({"cut": data[:-9], "changed": data[:-6] + b"\0\0\0\0\0\0", "none of it": b"not gz at all"}[damage])
    with pytest.raises(DataError, match=r"a\S+\.gz: (damaged gz data|the gz data ends)") as caught:
        file = open_input(path, FieldRule(domain="d"))
        list(read_rows(plan_units([file], 1 << 20)[0].slices[0], 1 << 20))
    assert "\n" not in str(caught.value)
