"""The identity of data: every row counts, and the number of processes does not."""

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from dataflex_mega.data import content
from dataflex_mega.data.content import BLOCK_ROWS, content_hashes
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.llamafactory.data import DatasetRows

MANY = BLOCK_ROWS + 900


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def fetch(self, numbers):
        return [(np.array(self.rows[n], dtype=np.int64),) * 2 for n in numbers]


def numbers(count=MANY):
    return [[r, r + 1, r % 7] for r in range(count)]


def only(rows):
    (found,) = content_hashes(SamplePool([Domain("d", rows)]), 0, 1, lambda own: [own]).values()
    return found


@pytest.mark.parametrize("row", [0, 1, 17, BLOCK_ROWS - 1, BLOCK_ROWS, MANY - 1])
def test_one_token_of_any_row_changes_it(row):
    changed = numbers()
    changed[row][1] += 1
    assert only(Rows(changed)) != only(Rows(numbers()))


def test_the_order_the_number_and_the_borders_of_rows_change_it():
    swapped = numbers()
    swapped[3], swapped[4] = swapped[4], swapped[3]
    found = [only(Rows(rows)) for rows in (numbers(), swapped, numbers(MANY - 1), [[1, 2], [3]], [[1], [2, 3]])]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_the_same_on_any_number_of_processes(world):
    pool, parts = SamplePool([Domain("d", Rows(numbers()))]), []
    for rank in range(world):  # each is asked once for its own part alone, and then with those of all
        with pytest.raises(KeyError):
            content_hashes(pool, rank, world, lambda own: parts.append(own) or [own])
    assert all(len(part) <= 1 for part in parts)
    for rank in range(world):
        assert content_hashes(pool, rank, world, lambda own: parts) == {"d": only(Rows(numbers()))}


@pytest.mark.parametrize("labels", [True, False])
def test_rows_read_at_once_count_like_rows_read_one_by_one(labels):
    columns = {"input_ids": numbers(50)} | ({"labels": [[-100, *row[1:]] for row in numbers(50)]} if labels else {})
    rows = DatasetRows(Dataset.from_dict(columns).select([*range(30, 50), 2, 1]))
    plain = rows.fetch(np.arange(22))

    class OneByOne(Rows):
        def fetch(self, numbers):
            return [plain[n] for n in numbers]

    assert only(rows) == only(OneByOne(plain))


def test_a_corpus_is_known_by_its_manifest():
    rows = Rows(numbers(3))
    rows.content = "uint16 abc in rows of 3"
    assert only(rows) == "uint16 abc in rows of 3"


def saved(folder, rows):
    Dataset.from_dict({"input_ids": rows}).save_to_disk(str(folder))
    return load_from_disk(str(folder))


def test_a_hash_is_kept_while_the_files_are_as_they_were(tmp_path, monkeypatch):
    whole = saved(tmp_path / "d", numbers(20))
    part = whole.select(range(5))
    expected = only(Rows(numbers(20))), only(Rows(numbers(5)))
    assert (only(DatasetRows(whole)), only(DatasetRows(part))) == expected
    assert DatasetRows(load_from_disk(str(tmp_path / "d"))).content == expected[0]
    assert DatasetRows(part).content == expected[1] and DatasetRows(whole.select(range(6))).content is None
    monkeypatch.setattr(content, "block_hash", lambda *_: "computed")
    assert (only(DatasetRows(whole)), only(DatasetRows(part))) == expected, "no row is read"
    known, unknown = {"d": expected[0]}, {}
    asked = iter([[known, unknown], [{("d", 0): "computed"}]])
    pool = SamplePool([Domain("d", DatasetRows(whole))])
    assert content_hashes(pool, 0, 2, lambda own: next(asked))["d"] != expected[0], "one rank does not know it"
    [file] = (tmp_path / "d").glob("*.arrow")
    file.write_bytes(file.read_bytes())
    assert DatasetRows(whole).content is None, "written again"


def test_a_kept_hash_that_cannot_be_read_is_none(tmp_path):
    whole = saved(tmp_path / "d", numbers(20))
    expected = only(DatasetRows(whole))
    [kept] = (tmp_path / "d").glob("*.content.json")
    for text in ("{", "[]", '{"key": 3}'):
        kept.write_text(text)
        assert DatasetRows(whole).content is None
        assert only(DatasetRows(whole)) == expected == DatasetRows(whole).content
