"""The sample pool: global ids, fetching by id, and fingerprints."""

import numpy as np
import pytest

from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.errors import DataError


class ListRows:
    def __init__(self, rows):
        self.rows = [np.asarray(r, dtype=np.int64) for r in rows]

    def __len__(self):
        return len(self.rows)

    def fetch(self, rows):
        return [(self.rows[r], self.rows[r]) for r in rows]


def pool(*sizes):
    return SamplePool([Domain(f"d{d}", ListRows([[d, r, r] for r in range(n)])) for d, n in enumerate(sizes)])


def test_ids_say_domain_and_row():
    made = pool(3, 1, 4)
    domain, row = made.locate(np.arange(8))
    assert domain.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] and row.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert made.describe(6) == "d2 row 2" and len(made) == 8


def test_fetch_keeps_the_order_asked_for_and_repeats():
    fetched = pool(3, 1, 4).fetch(np.array([7, 0, 3, 7]))
    assert [(s.sample_id, s.domain_id, s.input_ids.tolist()) for s in fetched] == [
        (7, 2, [2, 3, 3]), (0, 0, [0, 0, 0]), (3, 1, [1, 0, 0]), (7, 2, [2, 3, 3]),
    ]  # fmt: skip


def test_the_content_of_every_row_counts_and_how_rows_are_cut():
    many = 5000  # more rows than a fingerprint looks at, and than are read at once
    first = pool(3, many).content_hash()
    assert first == pool(3, many).content_hash() and first["d0"] == pool(3, 5).content_hash()["d0"]
    for row in (1, 1023, 1024, many - 1):
        changed = pool(3, many)
        changed.domains[1].rows.rows[row][1] = 99
        assert changed.content_hash()["d1"] != first["d1"], row
    one, two = ([[1, 2], [3]], [[1], [2, 3]])
    assert (
        SamplePool([Domain("d", ListRows(one))]).content_hash()
        != SamplePool([Domain("d", ListRows(two))]).content_hash()
    )


@pytest.mark.parametrize("domains", [[], [Domain("hollow", ListRows([]))]])
def test_nothing_to_draw_is_a_user_error(domains):
    with pytest.raises(DataError, match="hollow|at least one"):
        SamplePool(domains)
