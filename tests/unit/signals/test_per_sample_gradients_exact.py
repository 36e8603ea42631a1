"""Gradient scores in float64, where they differ from autograd by rounding alone."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from dataflex_mega.data.collate import collate
from dataflex_mega.distributed.parallel_info import init_distributed, shutdown_distributed
from dataflex_mega.engines.fsdp.engine import FSDPEngine
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.engines.options import StepOptions
from dataflex_mega.signals.per_sample_gradients import SampleSpan, sample_spans
from tests.distributed.layouts import samples_of, tiny_llama

BETAS, EPS = (0.8, 0.95), 1e-7


@pytest.fixture(scope="module")
def alone():
    yield init_distributed()
    shutdown_distributed(orderly=True)


class Float64Layout(FSDPLayout):
    """The attention mask of packed rows in float64, which no configuration trains in."""

    dtype = torch.float64  # type: ignore[assignment]


def tied_llama():
    config = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def in_float64(model):
    """Double precision all the way: transformers' RMSNorm goes through float32 whatever the model's dtype."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def engine(alone, request):
    """A float64 model after three steps of Adam."""
    model = in_float64(tied_llama() if request.param else tiny_llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=BETAS, eps=EPS)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    engine = FSDPEngine(FSDPModelRunner(model, Float64Layout("single"), alone), optimizer, scheduler, StepOptions(2))
    for step in range(3):
        engine.train_step([collate(samples_of(step), 0)], None)
    return engine


def gradient_of(model, sample):
    """Of one sample's mean token loss, alone: layer -> float64. The embeddings are a constant, so that a tied weight counts
    by its use as output layer."""
    ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    embedded = model.get_input_embeddings()(ids.unsqueeze(0)).detach()
    logits = model(inputs_embeds=embedded).logits[0, :-1]
    loss = F.cross_entropy(logits, labels[1:], ignore_index=-100)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def adam_of(engine, gradient):
    """The formula of Kingma and Ba 2015, written out; the live moments."""
    weights = {n: m.weight for n, m in engine.model.named_modules() if isinstance(m, torch.nn.Linear)}
    (b1, b2), updates = BETAS, {}
    for name, g in gradient.items():
        state = engine.optimizer.state[weights[name]]
        t = int(state["step"]) + 1
        m, v = b1 * state["exp_avg"] + (1 - b1) * g, b2 * state["exp_avg_sq"] + (1 - b2) * g**2
        updates[name] = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + EPS)
    return updates


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient.values()])


def expected_of(engine, candidates, targets, adam):
    """(dot [n, S], squared norms [n], directions) by autograd alone."""
    gradients = [gradient_of(engine.model, s) for s in candidates]
    gradients = [flat(adam_of(engine, g) if adam else g) for g in gradients]
    units = [[flat(gradient_of(engine.model, s)) for s in group] for group in targets]
    directions = torch.stack([torch.stack([g / g.norm() for g in group]).mean(0) for group in units])
    matrix = torch.stack(gradients)
    return matrix @ directions.t(), (matrix**2).sum(1), directions


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_scores_and_directions_are_those_of_autograd_to_rounding(engine, adam):
    targets, candidates = [samples_of(7)[:5], samples_of(8)[:3]], samples_of(9)
    scorer = engine.gradient_scorer(adam)
    directions = scorer.directions([[collate(group[:2], 0), collate(group[2:], 0)] for group in targets])
    dot, norm2 = scorer.score(collate(candidates, 0), directions)
    assert dot.dtype == norm2.dtype == torch.float64
    engine.model.eval()
    expected_dot, expected_norm2, expected_directions = expected_of(engine, candidates, targets, adam)
    actual = torch.cat([directions.for_layer(name).flatten(1) for name in directions.by_layer], dim=1)
    torch.testing.assert_close(actual, expected_directions, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(norm2, expected_norm2, rtol=1e-10, atol=0)
    scale = float(expected_norm2.max().sqrt())
    torch.testing.assert_close(dot, expected_dot, rtol=1e-9, atol=1e-11 * scale)


def test_packed_rows_and_other_batches_give_the_same_numbers(engine):
    scorer, samples = engine.gradient_scorer(True), [*samples_of(11), *samples_of(12), *samples_of(13), *samples_of(14)]
    packed = collate(samples, 0, 96)
    assert packed.is_packed and len(packed.input_ids) < len(samples) == 32
    plain = scorer.directions([[collate(samples_of(4), 0)]])
    packed_directions = scorer.directions([[collate(samples_of(4), 0, 96)]])
    for name in plain.by_layer:
        torch.testing.assert_close(plain.for_layer(name), packed_directions.for_layer(name), rtol=1e-9, atol=1e-13)
    dot, norm2 = scorer.score(collate(samples, 0), plain)
    scale = float(norm2.max().sqrt())
    for batches in ([packed], [collate([sample], 0) for sample in samples]):
        scores = [scorer.score(batch, plain) for batch in batches]
        torch.testing.assert_close(torch.cat([norm for _, norm in scores]), norm2, rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.cat([d for d, _ in scores]), dot, rtol=1e-8, atol=1e-11 * scale)


def test_a_sample_without_targets_has_no_gradient_and_moves_no_direction(engine):
    scorer, samples = engine.gradient_scorer(False), samples_of(5)
    samples[3].labels[:] = -100
    norm2 = scorer.score(collate(samples, 0), scorer.directions([[collate(samples, 0)]]))[1]
    assert norm2[3] == 0 and bool((norm2[[0, 1, 2, 4, 5, 6, 7]] > 0).all())
    without = scorer.directions([[collate([s for i, s in enumerate(samples) if i != 3], 0)]])
    name = next(iter(without.by_layer))
    torch.testing.assert_close(
        scorer.directions([[collate(samples, 0)]]).for_layer(name), without.for_layer(name), rtol=1e-9, atol=0
    )


def test_spans_of_padded_and_packed_rows():
    segment = torch.tensor([[0, 0, 2, 2, 2, -1], [1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1]])
    assert sample_spans(segment) == [SampleSpan(0, 0, 0, 2), SampleSpan(2, 0, 2, 5), SampleSpan(1, 1, 0, 6)]
