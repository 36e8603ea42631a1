"""Progress in a log file, where standard error is no terminal."""

import pytest

from dataflex_mega.progress import ProgressCounter, TrainingProgressBar


@pytest.fixture(autouse=True)
def main_rank(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_a_counter_writes_a_line_for_each_tenth(capsys):
    count = ProgressCounter("store: blocks", 25)
    for done in range(1, 26):
        count(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"store: blocks: {done}/25" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)]


def test_training_writes_a_line_now_and_then_and_at_the_end(capsys):
    bar = TrainingProgressBar(every=4)
    bar.start(0, 6)
    for step in range(1, 7):
        bar.update(step, {"loss": f"{step}.5", "mix": "[a]:0.50"})  # what looks like markup is text
    bar.update_scoring(1, 2)
    bar.print_line("eval_loss 1.2500")
    bar.stop()
    expected = ["step 4/6  loss 4.5  mix [a]:0.50", "step 6/6  loss 6.5  mix [a]:0.50", "eval_loss 1.2500"]
    assert capsys.readouterr().err.splitlines() == expected
