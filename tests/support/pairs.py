"""Ranking data: a chosen and a rejected answer to each question, of Python's language reference."""

import json

from tests.support import corpus

COLUMNS = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}


def rows(count, first=0):
    """Alpaca rows; answers of unlike lengths."""
    made = corpus.instructions(first + count)[first:]
    return [
        {
            "instruction": row["instruction"],
            "chosen": row["output"][: 60 + 7 * number],
            "rejected": row["output"][::-1][: 140 - 5 * number],
        }
        for number, row in enumerate(made)
    ]


def add(data, name, content, **entry):
    """Write a dataset of these rows and its entry in dataset_info.json."""
    info = json.loads((data / "dataset_info.json").read_text())
    info[name] = {"file_name": f"{name}.json", **(entry or COLUMNS)}
    (data / f"{name}.json").write_text(json.dumps(content))
    (data / "dataset_info.json").write_text(json.dumps(info))


def write(folder):
    """`corpus.write` with the ranking sets `first`, `second` (the first's answers exchanged) and `two`, and `reference/`."""
    corpus.write(folder)
    data, some = folder / "data", rows(12)
    add(data, "first", some)
    add(data, "second", [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(8, 12)])
    add(data, "two", some[:2])
    corpus.write_reference(folder)
    return folder
