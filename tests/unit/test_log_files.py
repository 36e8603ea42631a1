"""Log files after a kill and after a power failure."""

import json

import pytest

from dataflex_mega.log_files import is_own_log, read_rows, truncate_log


def lines(*steps):
    return [json.dumps({"step": step, "loss": 1.5}).encode() + b"\n" for step in steps]


def steps_of(path):
    return [json.loads(line).get("step") for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_and_an_incomplete_one_are_dropped(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"".join(lines(1, 2, 3, 4)) + b'{"step": 5, "lo')
    truncate_log(log, 3)
    assert steps_of(log) == [1, 2, 3] and not list(tmp_path.glob("*.damaged*"))


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (b"\0" * 4096 + b"\n", [1, 2, 3]),
        (b"\0" * 4096, [1, 2, 3]),  # right before the line of step 3, which can still be read
        (b'{"step": 2.5, "l\xff": 1}\n', [1, 2, 3]),
        (b"[1]\n", [1, 2, 3]),
        (b"[" * 100_000 + b"\n", [1, 2, 3]),
        (b'{"step": null}\n{"step": "2"}\n{"step": NaN}\n', [1, 2, 3]),
        (b'{"step": ' + b"9" * 5000 + b"}\n", [1, 2, 3]),
    ],
)
def test_lines_that_can_be_read_stay_and_the_damaged_file_is_kept(tmp_path, damage, left, caplog):
    log = tmp_path / "metrics.jsonl"
    content = b"".join(lines(1, 2)) + damage + b"".join(lines(3, 4))
    log.write_bytes(content)
    truncate_log(log, 3)
    assert steps_of(log) == left
    aside = tmp_path / "metrics.jsonl.damaged"
    if damage.endswith(b"\0"):
        assert not aside.exists(), "nothing is lost"
    else:
        assert aside.read_bytes() == content
    log.write_bytes(content)
    truncate_log(log, 3)
    assert (tmp_path / "metrics.jsonl.damaged-2").exists() != damage.endswith(b"\0")


def test_a_folder_of_that_name_goes_aside(tmp_path):
    log = tmp_path / "metrics.jsonl"
    (log / "inner").mkdir(parents=True)
    truncate_log(log, 3)
    assert not log.exists() and (tmp_path / "metrics.jsonl.damaged" / "inner").is_dir()


def test_a_file_of_the_user_under_a_similar_name_is_left(tmp_path):
    log = tmp_path / "class_weights.jsonl"
    log.write_text('{"class": "a", "weight": 2}\nno JSON\n')
    truncate_log(log, -1)
    assert log.read_text() == '{"class": "a", "weight": 2}\nno JSON\n' and not is_own_log(log)


def test_the_log_is_not_written_where_nothing_changes(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"".join(lines(1, 2)))
    before = log.stat().st_ino
    truncate_log(log, 2)
    assert log.stat().st_ino == before and [row["step"] for row in read_rows(log)] == [1, 2]
    assert read_rows(tmp_path / "none.jsonl") == []
