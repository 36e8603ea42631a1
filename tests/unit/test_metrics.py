"""Logs of a continued run: no line is repeated, none is missing."""

import json

import torch

from dataflex_mega.control.plan_report import LossCacheView, OrderRecord, PlanReport, SelectionRecord
from dataflex_mega.metrics import Metrics
from dataflex_mega.types import SamplingPlan, StepStats, TrainState, WeightStats


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
    metrics = Metrics(tmp_path, ("a", "b"), 8, is_writer=True, mixer_name="doremi")
    metrics.on_train_begin(TrainState(4, SamplingPlan(4, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(tmp_path / "doremi_weights.jsonl") == [0, 2]
    assert steps_of(tmp_path / "trainer_log.jsonl", "current_steps") == [2, 4]


def test_selections_that_the_run_has_not_made_are_dropped_but_not_in_a_folder_of_several_runs(tmp_path):
    for name in ("run/selections", "shared"):
        (tmp_path / name).mkdir(parents=True)
        for step in (2, 4, 6):
            (tmp_path / name / f"step_{step}.json").write_text("{}")
        (tmp_path / name / "step_notes.json").write_text("{}")
        metrics = Metrics(tmp_path / "run", ("a", "b"), 8, is_writer=True, selection_folder=tmp_path / name)
        metrics.on_train_begin(TrainState(4, SamplingPlan(4, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert sorted(p.name for p in (tmp_path / "run" / "selections").iterdir()) == ["step_2.json", "step_notes.json"]
    assert len(list((tmp_path / "shared").iterdir())) == 4


def test_another_rank_leaves_files_alone(tmp_path):
    write(tmp_path / "metrics.jsonl", [1, 2, 3])
    metrics = Metrics(tmp_path, ("a", "b"), 8, is_writer=False)
    metrics.on_train_begin(TrainState(1, SamplingPlan(1, (0.5, 0.5), (0, 0), (0.0, 0.0))))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_what_the_roles_did_for_a_plan_is_written_under_the_names_that_users_read(tmp_path):
    plan = SamplingPlan(4, (0.25, 0.75), (0, 0), (0.0, 0.0), selected_ids=torch.tensor([0, 2]))
    state, folders = TrainState(4, plan), (tmp_path / "chosen", tmp_path / "losses")
    metrics = Metrics(
        tmp_path, ("a", "b"), 8, True, mixer_name="odm", selection_folder=folders[0], scoreboard_folder=folders[1]
    )
    scores = torch.tensor([0.5, 0.25])
    report = PlanReport(
        mixer={"alpha": 0.5},
        selection=SelectionRecord(4, torch.tensor([0, 2]), scores, [0.25, 0.5], overlap=0.5),
        signal_name="loss",
        order=OrderRecord(4, 6, num_scored=3, mean_score=None, passes=[1, 0]),
        loss_cache=LossCacheView(torch.tensor([0.5, 7.0, torch.nan]), torch.tensor([3, 2, -1])),
    )
    metrics.on_plan(state, report)
    row = json.loads((tmp_path / "odm_weights.jsonl").read_text())
    assert row.pop("timestamp") and row == {
        "step": 4, "domain_names": ["a", "b"], "domain_weights": [0.25, 0.75], "alpha": 0.5
    }  # fmt: skip
    order = {"step": 4, "end": 6, "scored": 3, "mean_score": None, "passes": [1, 0]}
    assert json.loads((tmp_path / "orders.jsonl").read_text()) == order
    selection = json.loads((folders[0] / "step_4.json").read_text())
    assert selection == {"indices": [0, 2], "metric": {"loss": [0.5, 0.25]}}
    assert json.loads((folders[1] / "scoreboard_step_4.json").read_text()) == {
        "indices": [0, 2], "metric": {"loss": [0.5, None]}, "computed_at_step": {"loss": 3}
    }  # fmt: skip


def test_a_role_that_did_nothing_for_a_plan_leaves_no_line(tmp_path):
    metrics = Metrics(tmp_path, ("a", "b"), 8, is_writer=True, mixer_name="odm", selection_folder=tmp_path / "chosen")
    warmup = SamplingPlan(0, (0.5, 0.5), (0, 0), (0.0, 0.0), phase="warmup")
    metrics.on_plan(TrainState(0, warmup), PlanReport())
    assert list(tmp_path.iterdir()) == []


def test_callbacks_get_our_figures_beside_those_of_hugging_face(tmp_path):
    plan = SamplingPlan(4, (0.25, 0.75), (0, 0), (0.0, 0.0))
    state = TrainState(4, plan, tokens_seen=30)
    metrics = Metrics(tmp_path, ("a", "b"), 8, is_writer=False, mfu_per_token_rate=0.0)  # any rank, with a GPU
    selection = SelectionRecord(4, torch.tensor([0, 2]), torch.tensor([0.5, 0.25]), [0.25, 0.5], overlap=0.5)
    metrics.on_plan(state, PlanReport(selection=selection))
    stats = StepStats(
        2.0, 1.5, torch.tensor([2.0, 6.0]).double(), torch.tensor([2.0, 3.0]).double(), torch.tensor([1.0, 3.0]).double(),
        num_tokens=5, weights=WeightStats(0.5, 0.25, 2.0),
    )  # fmt: skip
    metrics.on_step_end(state, stats, 0.125, {})
    figures = metrics.flush(state)
    assert 0 < figures.pop("memory/peak_rss_gib") < 1000 and figures.pop("speed/tokens_per_second") > 0
    assert figures == {
        "loss": 1.6, "grad_norm": 1.5, "learning_rate": 0.125, "mix/a": 0.25, "mix/b": 0.75, "drawn/a": 0.25,
        "drawn/b": 0.75, "domain_loss/a": 1.0, "domain_loss/b": 2.0, "select/size": 2, "select/overlap": 0.5,
        "select/score_q0": 0.25, "select/score_q25": 0.5, "weight/entropy": 0.5, "weight/min": 0.25, "weight/max": 2.0,
        "speed/tokens_seen": 30, "speed/mfu": 0.0,
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []
