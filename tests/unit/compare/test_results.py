"""Tables of a comparison: means, spreads and costs against NumPy, and runs that are not finished."""

import csv
import io
import json
import math

import numpy as np
import pytest

from dataflex_mega.compare import plots, report, results, step_timer, suite
from dataflex_mega.compare.results import Cost, RunResult
from dataflex_mega.log_files import read_rows
from tests.unit.compare.test_suite import BASE

LOSS = {"plain": {1: 2.0, 2: 2.5, 3: 2.2}, "odm": {1: 1.9, 2: 2.6, 3: 2.0}}
SECONDS = {"plain": {1: 10.0, 2: 20.0, 3: 10.0}, "odm": {1: 11.0, 2: 24.0, 3: 10.0}}


@pytest.fixture
def finished(tmp_path):
    """Two methods, the second of two phases, with three seeds: everything that trainings leave, and no training."""
    phases = [{"phase": "before", "max_steps": 2}, {"phase": "after", "mixer": "odm"}]
    given = {"base": BASE, "methods": {"plain": None, "odm": phases}, "seeds": [1, 2, 3], "output_dir": str(tmp_path)}
    chosen = suite.build(given, "s.yaml")
    for run in chosen.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "trainer_state.json").write_text(json.dumps({"global_step": run.num_steps}))
        (run.folder / "tokenizer_config.json").write_text("{}")
        seconds = SECONDS[run.method][run.seed] / (1 if run.method == "plain" else 2) / run.num_steps
        write(run.folder / "times.jsonl", [{"step": s + 1, "seconds": seconds} for s in range(run.num_steps)])
        write(run.folder / "metrics.jsonl", [line(s + 1, run.seed) for s in range(run.num_steps)])
    return chosen


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def line(step, seed):
    proportions = {"a": 0.25 * seed, "b": 1 - 0.25 * seed}
    loss = {"a": 3.0 / step} if step % 2 else {"a": 3.0 / step, "b": 2.0}
    return {"step": step, "tokens": 100, "proportions": proportions, "drawn": {"a": 2, "b": 6}, "domain_loss": loss}


def evaluate(run):
    loss = LOSS[run.method][run.seed]
    domains = {name: {"loss": loss + shift} for name, shift in (("a_v", -0.1), ("b_v", 0.1))}
    return {"domains": domains, "overall": {"loss": loss}, "macro": {"loss": loss}}


def collect(finished, failed=None):
    return results.collect(finished, evaluate, failed or {})


def test_means_spreads_and_paired_differences_agree_with_numpy(finished):
    plain, odm = collect(finished).summaries
    ours, theirs = (np.exp(list(LOSS[name].values())) for name in ("odm", "plain"))
    assert odm.perplexity["overall"].mean == pytest.approx(ours.mean())
    assert odm.perplexity["overall"].deviation == pytest.approx(ours.std(ddof=1))
    assert odm.difference["overall"].mean == pytest.approx((ours - theirs).mean())
    assert odm.difference["overall"].deviation == pytest.approx((ours - theirs).std(ddof=1))
    assert odm.better["overall"] == 2 and plain.difference == {} and plain.overhead is None


def test_costs_are_those_of_all_phases_and_tell_the_final_one_apart(finished):
    plain, odm = collect(finished).summaries
    assert (plain.tokens, plain.extra_tokens, odm.tokens, odm.extra_tokens) == (400, 0, 400, 200)
    assert odm.seconds == pytest.approx(7.5) and odm.extra_seconds == pytest.approx(7.5)
    ratios = [SECONDS["odm"][s] / SECONDS["plain"][s] - 1 for s in (1, 2, 3)]
    assert odm.overhead is not None and odm.overhead.values == pytest.approx(ratios) == [0.1, 0.2, 0.0]


def test_an_unfinished_phase_leaves_its_seed_out_and_is_named(finished):
    (finished.phases_of("odm", 2)[0].folder / "trainer_state.json").unlink()
    comparison = collect(finished, {"odm/seed-2/before": "error: out of memory"})
    assert comparison.missing == {"odm/seed-2/before": "error: out of memory"}
    assert comparison.summaries[1].seeds == [1, 3] and len(comparison.summaries[1].difference["overall"].values) == 2
    assert "no result of `odm/seed-2/before`: error: out of memory" in report.as_markdown(comparison, [])


def test_a_model_is_evaluated_once(finished):
    collect(finished)
    assert len(results.collect(finished, lambda run: pytest.fail("again"), {}).results) == 6


def test_tokens_are_unknown_where_no_loop_counts_them(tmp_path):
    write(tmp_path / "times.jsonl", [{"step": 1, "seconds": 2.0}])
    assert results.read_cost(tmp_path) == Cost(None, 2.0, 1)
    assert results.sum_costs([Cost(None, 2.0, 1), Cost(5, 1.0, 1)]) == Cost(None, 3.0, 2)
    assert results.sum_costs([]) == Cost(0, 0.0, 0)


def test_one_seed_has_no_spread(tmp_path):
    one = RunResult("m", 1, tmp_path, {"a": 1.0, "overall": 1.0, "macro": 1.0}, Cost(1, 1.0, 1), Cost(0, 0.0, 0))
    summary = results.summarize([one], {1: one}, ["a"])
    assert summary.perplexity["a"].deviation is None and report.format_spread(summary.perplexity["a"]) == "2.72"


def test_files_hold_every_run_and_agree(finished):
    comparison = collect(finished)
    plot_files = plots.plot_comparison(comparison)
    report.write(comparison, plot_files)
    folder = finished.output_dir
    table = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    whole = json.loads((folder / "results.json").read_text())
    assert [(row["method"], int(row["seed"])) for row in table] == [(m, s) for m in ("plain", "odm") for s in (1, 2, 3)]
    for row, run in zip(table, whole["runs"], strict=True):
        assert float(row["perplexity_overall"]) == pytest.approx(math.exp(LOSS[row["method"]][int(row["seed"])]))
        assert float(row["perplexity_a_v"]) == run["perplexity"]["a_v"]
    text = (folder / "report.md").read_text()
    assert f"{np.exp(list(LOSS['odm'].values())).mean():.2f} +- " in text and "(2/3)" in text
    assert "| odm | 400 | 200 | 7.5 | 7.5 | +10.0 +- 10.0 % |" in text
    assert [p.name for p in plot_files] == ["proportions.png", "domain_loss.png", "perplexity.png"]
    assert all(f"]({p.name})" in text and p.stat().st_size > 5000 for p in plot_files)


def test_unequal_tokens_are_warned_of(finished):
    for seed in (1, 2, 3):
        folder = finished.phases_of("plain", seed)[0].folder
        write(folder / "metrics.jsonl", [line(step + 1, 1) for step in range(3)])
    assert "did not see the same number of tokens: `odm` 400, `plain` 300" in report.as_markdown(collect(finished), [])


def test_loss_curves_are_means_weighted_by_what_was_drawn():
    run = [
        {"drawn": {"a": 1}, "domain_loss": {"a": 4.0}, "tokens": 10},
        {"drawn": {"a": 3}, "domain_loss": {"a": 2.0}, "tokens": 30},
        {"drawn": {"a": 0}, "domain_loss": {}, "tokens": 5},
        {"drawn": {"a": 0}, "domain_loss": {}, "tokens": 5},
    ] * plots.NUM_BINS
    whole = plots.bin_losses(run[: 2 * plots.NUM_BINS], "a")
    assert whole[0] == pytest.approx(2.5) and 1 not in whole and whole[2] == pytest.approx(2.5)
    assert plots.tokens_by_end_of_bin(run[: 2 * plots.NUM_BINS], 1) == 50


class State:
    is_world_process_zero = True
    global_step = 0


class Args:
    def __init__(self, folder):
        self.output_dir = str(folder)


def test_the_step_timer_writes_one_line_per_step_and_drops_repeated_steps(tmp_path, monkeypatch):
    now = iter([0.0, 1.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(now))
    args, state = Args(tmp_path / "run"), State()
    first = step_timer.StepTimer()
    first.on_train_begin(args, state, None)
    for step in (1, 2):
        state.global_step = step
        first.on_step_end(args, state, None)
    state.global_step = 1  # killed, and continued from a checkpoint
    second = step_timer.StepTimer()
    second.on_train_begin(args, state, None)
    state.global_step = 2
    second.on_step_end(args, state, None)
    assert read_rows(tmp_path / "run" / "times.jsonl") == [
        {"step": 1, "seconds": 1.0},
        {"step": 2, "seconds": 4.0},
    ]
    assert results.read_cost(tmp_path / "run").seconds == 5.0
