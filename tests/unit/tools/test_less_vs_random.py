"""The data of tools/bench/less_vs_random.py: what LESS compares with is never what the result is measured on."""

import json
from argparse import Namespace
from pathlib import Path

import matplotlib.figure
import pytest

from tests.support import corpus


@pytest.fixture(scope="module")
def study():
    return corpus.tool("bench/less_vs_random")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_targets_and_held_out_text_are_different_rows_of_one_file(study, tmp_path):
    pool = lines(tmp_path / "pool.jsonl", [{"text": f"pool {n} " * 10} for n in range(50)])
    target = lines(
        tmp_path / "t.jsonl", [{"instruction": f"ask {n}", "input": "", "output": "\u2028answer"} for n in range(40)]
    )
    options = Namespace(characters=500, target=100, held_out=120)
    folder = tmp_path / "made"
    names, targets, held = study.write_data(study.Setting("s", [pool], [target]), folder, options)
    info = json.loads((folder / "dataset_info.json").read_text())
    read = {name: study.texts(folder / info[name]["file_name"]) for name in (*names, *targets)}
    assert 500 <= sum(map(len, read[names[0]])) < 600
    assert read[targets[0]][0] == "ask 0\n\n\u2028answer\n" and held[0] == "ask 20\n\n\u2028answer\n"
    assert not set(read[targets[0]]) & set(held) and 120 <= sum(map(len, held)) < 140


def test_settings_are_read_from_the_command_line_or_are_the_demos(study):
    given = study.settings_of(Namespace(setting=["a=x.jsonl,y.jsonl:z.jsonl"], data=Path("d")))
    assert given == [study.Setting("a", [Path("x.jsonl"), Path("y.jsonl")], [Path("z.jsonl")])]
    assert [len(s.targets) for s in study.settings_of(Namespace(setting=None, data=Path("d")))] == [1, 1]
    with pytest.raises(SystemExit, match="expected NAME=POOL"):
        study.settings_of(Namespace(setting=["a=x.jsonl"], data=Path("d")))


def test_the_report_asks_for_every_seed(study, capsys):
    def runs(*last):
        return [study.Outcome([(5, 9.0), (10, loss)], {"plan": 1.0, "train": 2.0}) for loss in last]

    setting = study.Setting("s", [], [])
    assert study.report(setting, {"random": runs(5.0, 5.1), "less": runs(4.9, 5.0)})
    assert "2 of 2" in capsys.readouterr().out
    assert not study.report(setting, {"random": runs(5.0, 5.1), "less": runs(4.9, 5.2)})


def test_one_figure_has_the_spread_and_the_seconds_of_all_settings(study, tmp_path, monkeypatch):
    """Two settings in one command, and a third by --add in another."""

    def outcomes(base):
        return [
            study.Outcome([[10, base + 1], [20, base + seed / 10]], {"plan": seed, "train": 2.0 + seed})
            for seed in range(3)
        ]

    def run_setting(setting, options):
        return {name: outcomes(4.0 - place) for place, name in enumerate(study.METHODS)}

    figures = []
    monkeypatch.setattr(study, "run_setting", run_setting)
    kept = matplotlib.figure.Figure.savefig

    def savefig(figure, *arguments, **keys):
        figures.append(figure)
        return kept(figure, *arguments, **keys)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    for names, more in ((("words", "code"), []), (("sums",), ["--add"])):
        given = [part for name in names for part in ("--setting", f"{name}=p.jsonl:t.jsonl")]
        monkeypatch.setattr("sys.argv", ["less_vs_random.py", *given, "--output", str(tmp_path), *more])
        assert study.main() == 0
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"words", "code", "sums"}
    assert (tmp_path / "less_vs_random.png").stat().st_size > 10_000
    both, three = figures[-2], figures[-1]
    assert [len(figure.axes) for figure in (both, three)] == [4, 6]
    losses, seconds = both.axes[1], both.axes[3]
    assert losses.get_title() == "code" and len(losses.lines) == len(losses.collections) == 3
    assert losses.lines[0].get_ydata().tolist() == pytest.approx([5.0, 4.1])
    edge = losses.collections[0].get_paths()[0].vertices[:, 1]
    assert (edge.min(), edge.max()) == pytest.approx((4.0, 5.0)), "the range of the seeds"
    assert [bar.get_width() for bar in seconds.patches] == [1.0] * 3 + [3.0] * 3
    assert seconds.get_legend_handles_labels()[1] == ["plan", "train"]
