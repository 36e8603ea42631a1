"""The first bad row of a data file is named, in a file or in a folder."""

import json

import pytest

from dataflex_mega.data.row_validation import first_bad_row


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "x"}\n', "a.jsonl, line 3: no 'text' in the row; it has 'body'"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2: a row must be an object, found list"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", '[{"text": "x"}, {"txt": 1}]', "a.json, row 1: no 'text' in the row; it has 'txt'"),
        ("a.json", '[{"text": "x"}, ', "a.json: not JSON"),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', None),
        ("a.jsonl", '{"text": "x"}\n', None),
        ("a.parquet", "not looked at", None),
    ],
)
def test_the_first_bad_row_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    found = first_bad_row(tmp_path / name, "text")
    assert (found is None) if said is None else (said in found)


def test_a_folder_is_searched(tmp_path):
    (tmp_path / "1.jsonl").write_text(json.dumps({"text": "fine"}))
    (tmp_path / "2.jsonl").write_bytes(b'{"text": "\xff"}\n')
    assert "2.jsonl, line 1: not JSON" in first_bad_row(tmp_path, "text")
