"""Streaming gradient scores against autograd's per-sample gradients."""

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
from dataflex_mega.signals.per_sample_gradients import AdamMoments, DotAndNormSums, LayerOperands, accumulate_layer
from tests.distributed.layouts import samples_of, tiny_llama


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


def engine_of(alone, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.8, 0.95), eps=1e-7)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return FSDPEngine(FSDPModelRunner(model, FSDPLayout("single"), alone), optimizer, scheduler, StepOptions(2))


def lora_of(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def linear_weights(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight.requires_grad}


def gradient_of(model, sample):
    """Of the mean token loss of one sample, alone and unpadded: {name: float64}."""
    ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
    weights = linear_weights(model)
    logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
    loss = F.cross_entropy(logits, labels[1:], ignore_index=-100)
    return {n: g.double() for n, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)}


def torch_adam_update(engine, name, gradient):
    """What torch.optim.Adam(lr=1) subtracts in its next step, from a copy of the live state."""
    weight = linear_weights(engine.model)[name]
    copied = torch.nn.Parameter(torch.zeros(weight.shape, dtype=torch.float64))
    adam = torch.optim.Adam([copied], lr=1.0, betas=(0.8, 0.95), eps=1e-7)
    state = engine.optimizer.state[weight]
    adam.state[copied] = {
        "step": state["step"].clone(), "exp_avg": state["exp_avg"].double(), "exp_avg_sq": state["exp_avg_sq"].double(),
    }  # fmt: skip
    copied.grad = gradient.clone()
    adam.step()
    return -copied.detach()


def inner(first, second):
    return sum((first[n] * second[n]).sum() for n in first)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_scores_equal_autograd_and_torch_adam(alone, lora, adam):
    model = lora_of(tiny_llama()) if lora else tiny_llama()
    engine = engine_of(alone, model)
    for step in range(3):  # moments of a real run
        engine.train_step([collate(samples_of(step), 0)], None)
    targets, candidates = [samples_of(7)[:5], samples_of(8)[:3]], samples_of(9)
    scorer = engine.gradient_scorer(adam)
    directions = scorer.directions([[collate(group, 0)] for group in targets])
    dot, norm2 = scorer.score(collate(candidates, 0), directions)

    model.eval()
    expected = []
    for group in targets:
        gradients = [gradient_of(model, sample) for sample in group]
        lengths = [inner(g, g).sqrt() for g in gradients]
        units = [{n: g[n] / length for n in g} for g, length in zip(gradients, lengths, strict=True)]
        expected.append({n: sum(u[n] for u in units) / len(group) for n in units[0]})
    for s, direction in enumerate(expected):
        for name, layer_directions in directions.by_layer.items():
            torch.testing.assert_close(layer_directions[s].double(), direction[name], rtol=1e-4, atol=1e-7, msg=name)
    for i, sample in enumerate(candidates):
        gradient = gradient_of(model, sample)
        if adam:
            gradient = {n: torch_adam_update(engine, n, g) for n, g in gradient.items()}
        assert norm2[i].item() == pytest.approx(inner(gradient, gradient).item(), rel=1e-4)
        for s, direction in enumerate(expected):
            scale = (inner(gradient, gradient) * inner(direction, direction)).sqrt().item()
            assert dot[i, s].item() == pytest.approx(inner(gradient, direction).item(), abs=2e-5 * scale)


def test_one_layer_is_exact_in_float64_terms_and_in_any_tiling(monkeypatch):
    from dataflex_mega.signals import per_sample_gradients

    torch.manual_seed(0)
    inputs, grads, directions = torch.randn(3, 9, 20), torch.randn(3, 9, 13), torch.randn(2, 13, 20)
    adam = AdamMoments(torch.randn(13, 20) * 0.1, torch.rand(13, 20) * 0.01, 4, (0.9, 0.99), 1e-8)
    results = []
    for tile in (1, 60, 1 << 18):
        monkeypatch.setattr(per_sample_gradients, "TILE", tile)
        sums = DotAndNormSums(torch.zeros(3, 2), torch.zeros(3))
        accumulate_layer(sums, LayerOperands(lambda: directions, lambda: adam), inputs, grads)
        results.append(sums)
    gradient = torch.einsum("nto,nti->noi", grads.double(), inputs.double())
    m = 0.9 * adam.first.double() + 0.1 * gradient
    v = 0.99 * adam.second.double() + 0.01 * gradient**2
    update = (m / (1 - 0.9**5)) / ((v / (1 - 0.99**5)).sqrt() + 1e-8)
    for sums in results:
        torch.testing.assert_close(sums.norm2.double(), (update**2).sum((1, 2)), rtol=1e-5, atol=0)
        expected = torch.einsum("noi,soi->ns", update, directions.double())
        torch.testing.assert_close(sums.dot.double(), expected, rtol=1e-4, atol=1e-3)


def test_golden_adam_update_of_the_paper():
    first, second = torch.tensor([[2e-5, 1e-5, -3e-5]]).double(), torch.tensor([[1e-9, 4e-9, 1e-12]]).double()
    adam = AdamMoments(first, second, 9, (0.9, 0.999), 1e-8)
    update = adam.update(torch.tensor([[[1e-4, -2e-4, 5e-5]]]).double())
    assert update.flatten().tolist() == pytest.approx([0.135028859, -0.0265239424, -1.8007229946], rel=2e-8)


def test_a_batch_of_one_equals_a_batch_of_many(alone):
    engine = engine_of(alone, tiny_llama())
    engine.train_step([collate(samples_of(0), 0)], None)
    scorer, samples = engine.gradient_scorer(True), samples_of(3)
    directions = scorer.directions([[collate(samples_of(4), 0)]])
    dot, norm2 = scorer.score(collate(samples, 0), directions)
    for i, sample in enumerate(samples):
        single_dot, single_norm2 = scorer.score(collate([sample], 0), directions)
        torch.testing.assert_close(single_norm2[0], norm2[i], rtol=1e-4, atol=0)
        torch.testing.assert_close(single_dot[0], dot[i], rtol=1e-3, atol=1e-4 * float(norm2[i].sqrt()))


def test_scoring_leaves_the_model_and_the_optimizer_as_they_were(alone):
    model = tiny_llama()
    engine = engine_of(alone, model)
    engine.train_step([collate(samples_of(0), 0)], None)
    before = copy.deepcopy((model.state_dict(), engine.optimizer.state_dict()))
    random = torch.get_rng_state()
    scorer = engine.gradient_scorer(True)
    scorer.score(collate(samples_of(2), 0), scorer.directions([[collate(samples_of(1), 0)]]))
    after = (model.state_dict(), engine.optimizer.state_dict())
    assert all(torch.equal(before[0][n], after[0][n]) for n in after[0])
    for index, state in after[1]["state"].items():
        assert all(torch.equal(before[1]["state"][index][n], value) for n, value in state.items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_a_candidate_that_is_a_target_scores_one(alone):
    from dataflex_mega.algorithms.selectors.less import Less
    from dataflex_mega.types import SignalTable

    engine = engine_of(alone, tiny_llama())
    scorer, samples = engine.gradient_scorer(adam=False), samples_of(5)
    directions = scorer.directions([[collate([samples[2]], 0)]])
    dot, norm2 = scorer.score(collate(samples, 0), directions)
    table = SignalTable(torch.arange(8), torch.zeros(8).long(), {"dot": dot, "norm2": norm2})
    scores = Less(gradient_type="sgd").score(table)
    assert scores[2].item() == pytest.approx(1, abs=1e-5) and scores.argmax() == 2
    assert scores.abs().max() <= 1 + 1e-5
