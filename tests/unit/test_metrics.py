"""Logs of a run that is continued: no line twice, none lost."""

import json

from dataflex_mega.metrics import Metrics
from dataflex_mega.types import Plan, TrainState


def write(path, steps, key="step"):
    path.write_text("".join(json.dumps({key: step}) + "\n" for step in steps))


def steps_of(path, key="step"):
    return [json.loads(line)[key] for line in path.read_text().splitlines()]


def test_a_continued_run_drops_what_it_will_write_again(tmp_path):
    """A checkpoint after 4 steps; the run that was cut short had planned steps 5 and 6 and done step 5.

    The line of a re-plan carries the number of steps done before it: number 4 belongs to step 5, which is done again.
    """
    write(tmp_path / "metrics.jsonl", [1, 2, 3, 4, 5])
    write(tmp_path / "doremi_weights.jsonl", [0, 2, 4, 5])
    write(tmp_path / "trainer_log.jsonl", [2, 4, 5], "current_steps")
    metrics = Metrics(tmp_path, ("a", "b"), 8, writes=True, mixer_name="doremi")
    metrics.begin(TrainState(4, Plan(4, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(tmp_path / "doremi_weights.jsonl") == [0, 2]
    assert steps_of(tmp_path / "trainer_log.jsonl", "current_steps") == [2, 4]


def test_selections_that_the_run_has_not_made_are_dropped_but_not_in_a_folder_of_several_runs(tmp_path):
    for name in ("run/selections", "shared"):
        (tmp_path / name).mkdir(parents=True)
        for step in (2, 4, 6):
            (tmp_path / name / f"step_{step}.json").write_text("{}")
        (tmp_path / name / "step_notes.json").write_text("{}")
        metrics = Metrics(tmp_path / "run", ("a", "b"), 8, writes=True, selection_folder=tmp_path / name)
        metrics.begin(TrainState(4, Plan(4, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert sorted(p.name for p in (tmp_path / "run" / "selections").iterdir()) == ["step_2.json", "step_notes.json"]
    assert len(list((tmp_path / "shared").iterdir())) == 4


def test_another_rank_leaves_files_alone(tmp_path):
    write(tmp_path / "metrics.jsonl", [1, 2, 3])
    metrics = Metrics(tmp_path, ("a", "b"), 8, writes=False)
    metrics.begin(TrainState(1, Plan(1, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
