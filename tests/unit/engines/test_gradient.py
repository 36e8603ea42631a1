"""The engine's update against autograd on the weighted loss, written out by hand on the same model."""

import copy

import pytest
import torch
import torch.nn.functional as F

from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.errors import NotFinite
from tests.distributed.layouts import samples_of, tiny_llama

RATE = 0.1


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def engine_of(alone, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    runner = FSDPModelRunner(model, FSDPLayout("single"), alone)
    return FSDPEngine(runner, optimizer, scheduler, StepOptions(2, max_grad_norm=0.0, **options))


def by_hand(model, made, weights, normalization):
    """Every sample alone, no padding, no packing: sum(w * loss) / count."""
    sums, tokens = [], []
    for sample in made:
        ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        logits = model(ids.unsqueeze(0)).logits[0, :-1]
        sums.append(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        tokens.append(int((labels[1:] != -100).sum()))
    if normalization == "sample":
        return sum(w * s / n for w, s, n in zip(weights, sums, tokens, strict=True)) / len(made)
    return sum(w * s for w, s in zip(weights, sums, strict=True)) / sum(tokens)


@pytest.mark.parametrize("normalization", ["token", "sample"])
@pytest.mark.parametrize("pack", [None, 64])
@pytest.mark.parametrize("weight_scope", ["micro_batch", "step"])
def test_an_update_is_the_gradient_of_the_weighted_loss(alone, normalization, pack, weight_scope):
    model, made = tiny_llama(), samples_of(1)
    reference = copy.deepcopy(model)
    scale = torch.tensor([0.2, 1.7, 0.4, 1.9, 0.1, 2.5, 0.7, 0.5])

    def weigh(samples):
        return scale[samples.sample_ids - 100]

    engine = engine_of(alone, model, normalization=normalization, weight_scope=weight_scope)
    stats = engine.train_step([collate(made[:4], 0, pack), collate(made[4:], 0, pack)], weigh)
    loss = by_hand(reference, made, scale, normalization)
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for (name, after), before in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(after, before - RATE * before.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_other_weights_give_another_update(alone):
    made, after = samples_of(2), []
    for weights in (torch.ones(8), torch.linspace(0.2, 1.8, 8)):
        model = tiny_llama()
        engine_of(alone, model).train_step([collate(made, 0)], lambda samples, w=weights: w)
        after.append(model.lm_head.weight.detach().clone())
    assert (after[0] - after[1]).abs().max() > 1e-5


def test_clipping_bounds_the_update(alone):
    model, before = tiny_llama(), tiny_llama()
    engine = engine_of(alone, model)
    engine.options = StepOptions(2, max_grad_norm=0.01)
    engine.train_step([collate(samples_of(3), 0)], None)
    moved = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(model.parameters(), before.parameters(), strict=True)))
    assert moved.item() == pytest.approx(RATE * 0.01, rel=1e-3)


def test_scoring_changes_nothing_and_equals_the_training_losses(alone):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    engine = engine_of(alone, model)
    batch, state = collate(samples_of(4), 0), torch.get_rng_state()
    scored = engine.sample_losses(batch)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    seen = []
    engine.train_step([batch], lambda samples: seen.append(samples) or torch.ones(8))
    assert torch.equal(seen[0].loss_sum, scored.loss_sum)


def test_a_loss_that_is_not_finite_changes_no_parameter(alone):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    before = copy.deepcopy(model.state_dict())
    made = samples_of(5)
    bad = [s.sample_id for s in made if 7 in s.input_ids[:-1]]
    made[0].input_ids[0], bad = 7, sorted({made[0].sample_id, *bad})
    with pytest.raises(NotFinite) as fault:
        engine_of(alone, model).train_step([collate(made, 0)], None)
    assert fault.value.sample_ids == bad
    assert all(torch.equal(before[n].nan_to_num(), v.nan_to_num()) for n, v in model.state_dict().items())
