"""GREATS in whole runs: equal for every batch partition, equal to a choice from autograd's gradients, with effect."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.algorithms.weighters.greats import greedy_select
from dataflex_mega.providers.batch_gradients import BatchGradientProvider
from dataflex_mega.providers.context import BatchScope
from dataflex_mega.types import TrainState
from tests.support import corpus, runs
from tests.support.built_run import Trial, build_run

pytestmark = pytest.mark.exhaustive

EXACT = {"name": "greats", "side": 512, "target_batch": 0}  # nothing is projected away
KEYS = {"eval_dataset": "tables", "max_samples": 2, "max_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("greats"))


def config_of(folder, name, **keys):
    return runs.base(folder, output_dir=str(folder / name), **{**KEYS, "weighter": EXACT, **keys})


def losses(config):
    return [(row["objective"], row["grad_norm"], row["loss"]) for row in runs.rows(config)]


@pytest.fixture(scope="module")
def alone(folder):
    configs = {
        "exact": config_of(folder, "exact"),
        "split": config_of(folder, "split", per_device_train_batch_size=2, gradient_accumulation_steps=4),
        "adam": config_of(folder, "adam", weighter={"name": "greats", "gradient_type": "adam", "target_batch": 5}),
        "all": config_of(folder, "all", weighter={**EXACT, "keep_ratio": 1.0}),
        "plain": config_of(folder, "plain", weighter={"name": "loss", "strategy": "uniform"}),
    }
    finished = runs.train_many(1, list(configs.values()))
    assert [status for status, _ in finished] == [0] * len(configs), finished
    return configs


def test_accumulation_changes_nothing_and_keeping_all_is_plain_training(alone):
    for first, second in (("exact", "split"), ("all", "plain")):
        np.testing.assert_allclose(losses(alone[first]), losses(alone[second]), rtol=1e-5)
    assert abs(losses(alone["exact"])[0][0] - losses(alone["all"])[0][0]) > 1e-4


@pytest.mark.parametrize(("world", "sharded"), [(2, True), (4, False)])
def test_every_number_of_processes_trains_the_same(folder, alone, world, sharded):
    configs = [
        {**alone[name], "output_dir": str(folder / f"{name}-{world}"), "per_device_train_batch_size": 8 // world,
         **({"fsdp": "full_shard"} if sharded else {})}
        for name in ("exact", "adam")
    ]  # fmt: skip
    for name, config, (status, stderr) in zip(("exact", "adam"), configs, runs.train_many(world, configs), strict=True):
        assert status == 0, stderr
        np.testing.assert_allclose(losses(config), losses(alone[name]), rtol=1e-4)


def test_products_are_those_of_autograds_gradients(folder):
    run, trainer = build_run(config_of(folder, "here"))
    engine = trainer.engine
    ids = run.schedule.sampler.global_batch(trainer.controller.initial_plan(), 0)
    before = copy.deepcopy(engine.model.state_dict())
    (request,) = run.roles.algorithms.weighter.requests()
    provider = BatchGradientProvider(run.data.signal_context(run.session, engine))
    gradients = provider.compute(request, BatchScope(0, lambda: ids))
    dot, gram = gradients.dot, gradients.gram
    assert gradients.sample_ids.tolist() == ids.tolist()
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())
    assert all(p.grad is None for p in engine.model.parameters())
    weights = [m.weight for m in engine.model.modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad]

    def gradient(sample):
        logits = engine.model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0)).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.from_numpy(sample.labels)[1:], ignore_index=-100)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double()

    rows = torch.stack([gradient(sample) for sample in run.data.pool.fetch(ids)])
    (group,) = run.data.evaluation.values()
    target = torch.stack([gradient(sample) for sample in group.fetch(np.arange(len(group)))]).mean(0)
    torch.testing.assert_close(dot.double(), rows @ target, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gram.double(), rows @ rows.t(), rtol=1e-3, atol=1e-6)
    assert greedy_select(dot, gram, 4, 1.0).tolist() == greedy_select(rows @ target, rows @ rows.t(), 4, 1.0).tolist()
    trainer.loader.close()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_step_on_what_it_keeps_helps_the_targets_more_than_one_on_what_it_drops(folder, kind):
    weighter = {**EXACT, "gradient_type": kind}
    keys = {"weighter": weighter, "lr_scheduler_type": "constant", "max_samples": 6}
    _, trainer = build_run(config_of(folder, f"effect-{kind}", **keys))
    engine, plan = trainer.engine, trainer.controller.initial_plan()
    trial, start = Trial(engine), trainer.evaluate()["eval_loss"]
    after = []
    for step in range(3):  # three batches, each trained from the start
        weigh = trainer.controller.weight_fn(TrainState(step, plan))
        micro_batches = trainer.loader.micro_batches(plan, step)
        losses_after = []
        for weight_fn in (weigh, lambda samples, weigh=weigh: 2 - weigh(samples)):
            engine.train_step(micro_batches, weight_fn)
            losses_after.append(trainer.evaluate()["eval_loss"])
            trial.undo()
        after.append(losses_after)
    trainer.loader.close()
    for losses_after, dropped in after:
        assert losses_after < start and losses_after < dropped - 0.005, after
