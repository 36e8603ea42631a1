"""Rows of ranking data: what is wrong with one, found before LLaMA-Factory drops it or trains it."""

import json

import numpy as np
import pytest

from dataflex_mega.data.pairs import split_pair
from dataflex_mega.errors import DataError
from dataflex_mega.llamafactory.pair_rows import PairRows
from dataflex_mega.llamafactory.row_format import row_problem
from tests.unit.llamafactory.test_raw_rows import lines, read

ALPACA = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
TALK = {
    "formatting": "sharegpt", "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}  # fmt: skip
ASK, SAY, NO = ({"from": role, "value": text} for role, text in (("human", "a"), ("gpt", "b"), ("gpt", "c")))
TEXTS = {"instruction": "a", "chosen": "b", "rejected": "c"}
PAIR = {"conversations": [ASK], "chosen": SAY, "rejected": NO}
# name -> (entry, row, what is said of it; None: nothing)
ROWS = {
    "texts": (ALPACA, TEXTS, None),
    "no rejected": (ALPACA, {**TEXTS, "rejected": None}, "'rejected' must be text, found null"),
    "a list": (ALPACA, {**TEXTS, "chosen": ["b"]}, "'chosen' must be text, found ['b']"),
    "a talk": (TALK, PAIR, None),
    "a longer talk": (TALK, {**PAIR, "conversations": [{"from": "system", "value": "s"}, ASK, SAY, ASK]}, None),
    "answered": (TALK, {**PAIR, "conversations": [ASK, SAY]}, "the last message is 'gpt'; one of 'human' or"),
    "no talk": (TALK, {**PAIR, "conversations": []}, "'conversations' is empty"),
    "by the user": (TALK, {**PAIR, "chosen": ASK}, "'chosen': 'from' must be 'gpt' or 'function_call', found 'human'"),
    "null": (TALK, {**PAIR, "rejected": None}, "'rejected': expected {'from': ..., 'value': ...}, found null"),
    "null text": (TALK, {**PAIR, "rejected": {"from": "gpt", "value": None}}, "'rejected': 'value' must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    from llamafactory.data.parser import get_dataset_list

    entry, row, expected = ROWS[name]
    attributes = get_dataset_list(["d"], {"d": {"file_name": "d.jsonl", **entry}})[0]
    problem = row_problem(row, attributes, "dpo")
    assert problem is None if expected is None else expected in problem, problem


# name -> (entry, second row, stage, words of the line; None: nothing is wrong)
FILES = {
    "texts": (ALPACA, TEXTS, "dpo", None),
    "talks": (TALK, PAIR, "dpo", None),
    "an answer of the user": (TALK, {**PAIR, "rejected": ASK}, "dpo", ["line 2", "'rejected'", "'human'"]),
    "a column": ({**ALPACA, "columns": {"prompt": "instruction", "chosen": "chosn", "rejected": "rejected"}}, TEXTS, "dpo",
                 ["no 'chosn'", "columns.chosen", "did you mean 'chosen'"]),
    "no column": ({"ranking": True}, TEXTS, "dpo", ["columns in dataset_info.json names no chosen"]),
    "not pairs": ({}, TEXTS, "dpo", ["stage: dpo needs pairs", '"ranking": true']),
    "another stage": (ALPACA, TEXTS, "sft", ["ranking: true", "stage: sft"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    entry, row, stage, words = FILES[name]
    first = PAIR if entry is TALK else TEXTS
    if name == "no column":
        first = row = {"instruction": "a", "input": "", "output": "b"}
    (tmp_path / "d.jsonl").write_text(lines(first, row))

    def check():
        read(tmp_path, {"file_name": "d.jsonl", **entry}, stage)[0].check_answers()

    if words is None:
        check()
        return
    with pytest.raises(DataError) as caught:
        check()
    for word in ["dataset 'd': ", *words]:
        assert word in str(caught.value), str(caught.value)


def test_tokenized_pairs_and_their_targets():
    import datasets

    columns = {
        "chosen_input_ids": [[1, 2, 3], [1, 4]], "chosen_labels": [[-100, 2, 3], [-100, -100]],
        "rejected_input_ids": [[1, 5], [1, 6, 7]], "rejected_labels": [[-100, 5], [-100, 6, 7]],
    }  # fmt: skip
    dataset = datasets.Dataset.from_dict(json.loads(json.dumps(columns)))
    assert PairRows.fits(dataset) and not PairRows.fits(dataset.remove_columns("chosen_input_ids"))
    rows = PairRows(dataset)
    (chosen, rejected), _ = (split_pair(*one) for one in rows.fetch(np.array([0, 1])))
    assert [part.tolist() for part in (*chosen, *rejected)] == [[1, 2, 3], [-100, 2, 3], [1, 5], [-100, 5]]
    assert rows.target_counts().tolist() == [3, 0], "a pair of which one answer has no target trains nothing"
