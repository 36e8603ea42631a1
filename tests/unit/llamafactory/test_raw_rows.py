"""Bad rows of every format end in one line that names dataset, file, row and key, or are counted; good ones pass."""

import json
from types import SimpleNamespace

import pytest

from dataflex_mega.errors import DataError
from dataflex_mega.llamafactory import raw_rows
from dataflex_mega.llamafactory.row_format import row_problem

TEXT = {"columns": {"prompt": "text"}}
CHAT = {"formatting": "sharegpt"}
TOOLS = {**CHAT, "columns": {"messages": "conversations", "tools": "tools"}}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "system_tag": "system", "observation_tag": "tool", "function_tag": "function",
    },
}  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def turn(*pairs, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **more}


FINE = turn(("human", "a"), ("gpt", "b"))
# name -> (file name, content, entry, stage, words of the line; None: nothing is wrong)
FILES = {
    "pt null": ("d.jsonl", lines({"text": "x"}, {"text": None}), TEXT, "pt", ["1 of 2 rows", "line 2", "null"]),
    "pt empty": ("d.jsonl", lines({"text": ""}, {"text": "x"}), TEXT, "pt", ["1 of 2 rows", "line 1", "''"]),
    "pt missing": ("d.jsonl", lines({"text": "x"}, {"id": 1}), TEXT, "pt", ["1 of 2 rows", "line 2", "null"]),
    "pt white space": ("d.jsonl", lines({"text": "x"}, {"text": " \n\t"}), TEXT, "pt", ["1 of 2 rows", "line 2"]),
    "pt all three": (
        "d.jsonl", lines(*[{"text": "x"}] * 5, {"text": None}, {"text": ""}, {}), TEXT, "pt", ["3 of 8 rows", "line 6"],
    ),
    "pt after an empty line": ("d.jsonl", '{"text": "x"}\n\n{"text": null}\n', TEXT, "pt", ["1 of 2 rows", "line 3"]),
    "pt all null": ("d.jsonl", lines({"text": None}, {"text": None}), TEXT, "pt", ["2 of 2 rows", "line 1"]),
    "pt array": ("d.json", json.dumps([{"text": "x"}, {"text": ""}]), TEXT, "pt", ["1 of 2 rows", "d.json, row 1"]),
    "pt csv": ("d.csv", "text,n\nhello,1\n,2\n", TEXT, "pt", ["1 of 2 rows", "d.csv, row 1", "null"]),
    "pt txt": ("d.txt", "one\n\ntwo\n", TEXT, "pt", ["1 of 3 rows", "d.txt, line 2"]),
    "pt number": ("d.jsonl", lines({"text": 5}), TEXT, "pt", ["line 1", "'text' must be text", "int64 5"]),
    "pt list": ("d.jsonl", lines({"text": ["a"]}), TEXT, "pt", ["'text' must be text", "list", "['a']"]),
    "pt object": ("d.jsonl", lines({"text": {"a": "b"}}), TEXT, "pt", ["'text' must be text", "struct"]),
    "pt true": ("d.jsonl", lines({"text": True}), TEXT, "pt", ["'text' must be text", "bool True"]),
    "pt csv of numbers": ("d.csv", "text\n1\n2\n", TEXT, "pt", ["'text' must be text", "int64 1"]),
    "pt column": ("d.jsonl", lines({"txt": "x"}), TEXT, "pt", ["line 1", "no 'text'", "did you mean 'txt'"]),
    "pt no columns": ("d.jsonl", lines({"text": "x"}), {}, "pt", ["no 'instruction'", "columns.prompt", "text"]),
    "pt no prompt": ("d.jsonl", lines({"text": "x"}), {"columns": {"response": "text"}}, "pt", ["no prompt"]),
    "pt txt by default": ("d.txt", "one\n", {}, "pt", ["no 'instruction'", "text"]),
    "pt prompt or query": (
        "d.jsonl", lines({"t": "", "q": "x"}, {"t": "y", "q": None}),
        {"columns": {"prompt": "t", "query": "q"}}, "pt", None,
    ),
    "empty file": ("d.jsonl", "", TEXT, "pt", ["d.jsonl is empty"]),
    "empty array": ("d.json", "[]", TEXT, "pt", ["d.json"]),
    "broken line": ("d.jsonl", '{"text": "x"}\n{"text": "y\n', TEXT, "pt", ["d.jsonl, line 2", "not JSON"]),
    "broken array": ("d.json", '[{"text": "x"}, {"text": ', TEXT, "pt", ["d.json", "not JSON"]),
    "one broken file": ("d.json", "{nonsense", TEXT, "pt", ["d.json", "not JSON"]),
    "not UTF-8": ("d.jsonl", '{"text": "ä"}\n'.encode("latin-1"), TEXT, "pt", ["d.jsonl, line 1"]),
    "UTF-16": ("d.jsonl", lines({"text": "x"}).encode("utf-16"), TEXT, "pt", ["d.jsonl, line 1"]),
    "not parquet": ("d.parquet", "hello", TEXT, "pt", ["d.parquet cannot be read"]),
    "list of numbers": ("d.json", "[1, 2, 3]", TEXT, "pt", ["d.json, row 0", "must be text, found int64 1"]),
    "unknown type": ("d.xml", "<a/>", TEXT, "pt", ["d.xml", "of no type that can be read", "jsonl"]),
    "no type": ("data", "x", TEXT, "pt", ["of no type that can be read"]),
    "alpaca": ("d.jsonl", lines({"instruction": "a", "input": "", "output": ""}), {}, "sft", None),
    "alpaca null input": ("d.jsonl", lines({"instruction": "a", "input": None, "output": "b"}), {}, "sft", None),
    "alpaca without input": ("d.jsonl", lines({"instruction": "a", "output": "b"}), {}, "sft", ["no 'input'", "line 1"]),
    "alpaca prompt of numbers": (
        "d.jsonl", lines({"instruction": 1, "input": "", "output": "b"}), {}, "sft", ["'instruction' must be text", "1"],
    ),
    "sharegpt without messages": ("d.jsonl", lines({"messages": []}), CHAT, "sft", ["no 'conversations'", "messages"]),
    "sharegpt names no messages": ("d.jsonl", lines(FINE), {**CHAT, "columns": {"tools": "t"}}, "sft", ["no 't'"]),
    "ranking": ("d.jsonl", lines(FINE), {**CHAT, "ranking": True}, "sft", ["ranking: true", "stage: sft"]),
    "split": ("d.jsonl", lines({"text": "x"}), {**TEXT, "split": "tset"}, "pt", ["d.jsonl cannot be read", "tset"]),
}  # fmt: skip


def read(folder, entry, stage, max_samples=None):
    """Rows of the dataset `d`, checked."""
    from contextlib import nullcontext

    info = {"d": entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    args = SimpleNamespace(
        data=SimpleNamespace(
            dataset_dir=str(folder),
            preprocessing_num_workers=None,
            data_shared_file_system=False,
            max_samples=max_samples,
        ),
        model=SimpleNamespace(cache_dir=str(folder / "cache"), hf_hub_token=None),
        finetuning=SimpleNamespace(stage=stage),
        training=SimpleNamespace(main_process_first=lambda **_: nullcontext()),
    )
    raw = raw_rows.read(args, "d")
    assert raw is not None
    raw.check_columns()
    return raw, raw.check_texts()


@pytest.mark.parametrize("name", FILES)
def test_files_and_columns(tmp_path, name):
    file, content, entry, stage, words = FILES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    entry = {"file_name": file, **entry}
    if words is None:
        assert read(tmp_path, entry, stage)[1] == []
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path, entry, stage)
    message = str(caught.value)
    assert message.startswith("dataset 'd': ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_a_row_that_is_not_used_is_not_looked_at(tmp_path):
    (tmp_path / "d.jsonl").write_text(lines({"text": "x"}, {"text": "y"}, {"text": None}))
    assert read(tmp_path, {"file_name": "d.jsonl", **TEXT}, "pt", max_samples=2)[1] == []


def test_empty_prompts_of_instructions_are_counted(tmp_path):
    rows = [{"instruction": "", "input": "", "output": "b"}, {"instruction": "a", "input": "", "output": "b"}]
    (tmp_path / "d.jsonl").write_text(lines(*rows))
    _, notes = read(tmp_path, {"file_name": "d.jsonl"}, "sft")
    assert len(notes) == 1 and "1 of 2 rows have an empty prompt; the first is" in notes[0] and "line 1" in notes[0]


def folder_of(tmp_path, **files):
    folder = tmp_path / "many"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


FOLDERS = {
    "empty": ({}, ["is an empty folder"]),
    "spark": (
        {"a__jsonl": lines({"text": "x"}), "_SUCCESS": ""},
        ["_SUCCESS is of no type that can be read", "move it"],
    ),
    "types": ({"a__jsonl": lines({"text": "x"}), "b__csv": "text\nx\n"}, ["different types", "a.jsonl and b.csv"]),
    "one is empty": ({"a__jsonl": lines({"text": "x"}), "b__jsonl": ""}, ["b.jsonl is empty"]),
    "one is broken": ({"a__jsonl": lines({"text": "x"}), "b__jsonl": '{"text": \n'}, ["b.jsonl, line 1", "not JSON"]),
    "null in one": ({"a__jsonl": lines({"text": "x"}), "b__jsonl": lines({"text": ""})}, ["1 of 2", "b.jsonl, line 1"]),
    "saved": ({"state__json": "{}", "dataset_info__json": "{}"}, ["save_to_disk", "to_json or to_parquet"]),
    "saved splits": ({"dataset_dict__json": "{}"}, ["save_to_disk"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    files, words = FOLDERS[name]
    folder_of(tmp_path, **files)
    with pytest.raises(DataError) as caught:
        read(tmp_path, {"file_name": "many", **TEXT}, "pt")
    for word in ["dataset 'd': ", *words]:
        assert word in str(caught.value), str(caught.value)


def test_a_folder_in_a_folder(tmp_path):
    (folder_of(tmp_path, a__jsonl=lines({"text": "x"})) / ".cache").mkdir()
    with pytest.raises(DataError, match=r"holds a folder, \.cache"):
        read(tmp_path, {"file_name": "many", **TEXT}, "pt")


# name -> (row, entry, what row_problem says; None: nothing)
ROWS = {
    "sharegpt": (FINE, CHAT, None),
    "sharegpt system": (turn(("system", "s"), ("human", "a"), ("gpt", "b")), CHAT, None),
    "null messages": ({"conversations": None}, CHAT, "'conversations' must be a list of messages, found null"),
    "messages are text": ({"conversations": "hello"}, CHAT, "must be a list of messages, found 'hello'"),
    "no messages": ({"conversations": []}, CHAT, "'conversations' is empty"),
    "null message": ({"conversations": [None]}, CHAT, "message 0: expected {'from': ..., 'value': ...}, found null"),
    "roles without tags": (
        {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, CHAT,
        'message 0: no \'from\'; it has \'role\', \'content\'; set "tags": {"role_tag": "role"',
    ),
    "null content": (turn(("human", "a"), ("gpt", None)), CHAT, "message 1: 'value' must be text, found null"),
    "number content": (turn(("human", 5), ("gpt", "b")), CHAT, "message 0: 'value' must be text, found 5"),
    "unknown role": (turn(("user", "a"), ("gpt", "b")), CHAT, "'from' must be 'human' or 'observation' there, found 'user'"),
    "order": (turn(("gpt", "a"), ("human", "b")), CHAT, "message 0: 'from' must be 'human' or 'observation' there"),
    "two of the user": (turn(("human", "a"), ("human", "b")), CHAT, "message 1: 'from' must be 'gpt' or 'function_call'"),
    "no answer": (turn(("human", "a"), ("gpt", "b"), ("human", "c")), CHAT, "the last message is 'human'"),
    "system only": (turn(("system", "a")), CHAT, "has no turn but 'system'"),
    "system in the middle": (turn(("human", "a"), ("system", "b")), CHAT, "message 1: 'from' must be"),
    "call": (turn(("human", "a"), ("function_call", '{"name": "w", "arguments": {}}')), CHAT, None),
    "call that is not JSON": (
        turn(("human", "a"), ("function_call", "w(1)")), CHAT, "message 1: 'value' of a function_call is not JSON",
    ),
    "call without arguments": (
        turn(("human", "a"), ("function_call", '{"name": "w"}')), CHAT, "must have 'name' and 'arguments'",
    ),
    "tools": (turn(("human", "a"), ("gpt", "b"), tools="[]"), TOOLS, None),
    "broken tools": (
        turn(("human", "a"), ("gpt", "b"), tools="[{not"),
        TOOLS, "'tools' is not JSON: Expecting property name",
    ),
    "tools are an object": (
        turn(("human", "a"), ("gpt", "b"), tools="{}"),
        TOOLS, "'tools' must be a list of tools as JSON",
    ),
    "tool without name": (
        turn(("human", "a"), ("gpt", "b"), tools='[{"description": "x"}]'),
        TOOLS, "a tool must have 'name'",
    ),
    "tools are a list": (
        turn(("human", "a"), ("gpt", "b"), tools=[{"name": "x"}]),
        TOOLS, "'tools' must be JSON as text",
    ),
    "null output": ({"instruction": "a", "input": "", "output": None}, {}, "'output' must be text, found null"),
    "number output": ({"instruction": "a", "input": "", "output": 7}, {}, "'output' must be text, found 7"),
    "no response": ({"instruction": "a"}, {"columns": {"prompt": "instruction"}}, "names no response"),
    "history": (
        {"instruction": "a", "output": "b", "history": [["q"]]},
        {"columns": {"prompt": "instruction", "response": "output", "history": "history"}},
        "'history', turn 0: expected [prompt, answer]",
    ),
    "null system": (
        {"instruction": "a", "output": "b", "system": None},
        {"columns": {"prompt": "instruction", "response": "output", "system": "system"}}, None,
    ),
    "number system": (
        {"instruction": "a", "output": "b", "system": 3},
        {"columns": {"prompt": "instruction", "response": "output", "system": "system"}}, "'system' must be text, found 3",
    ),
    "openai": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": None}, OPENAI, None,
    ),
    "openai calls": (
        {"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w", "arguments": {}}}]},
            {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "b"},
        ]}, OPENAI, None,
    ),
    "openai developer": (
        {"messages": [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b"}]}, OPENAI,
        "'role' must be 'user' or 'tool' there, found 'developer'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(tmp_path, name):
    from llamafactory.data.parser import get_dataset_list

    row, entry, expected = ROWS[name]
    attributes = get_dataset_list(["d"], {"d": {"file_name": "d.jsonl", **entry}})[0]
    problem = row_problem(row, attributes, "sft")
    assert problem is None if expected is None else (expected in problem), problem
