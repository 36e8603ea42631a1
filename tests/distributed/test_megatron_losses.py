"""Loss forms on the Megatron engine, over shards of a padded vocabulary, against the FSDP engine."""

import pytest
import torch

from dataflex_mega.losses.dft import DynamicFineTuning
from dataflex_mega.losses.eaft import EntropyAdaptive
from dataflex_mega.losses.label_smoothing import LabelSmoothing
from tests.distributed.gradient_scores import fsdp_engine, make_micro_batches, megatron_engine, samples
from tests.support import runs

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.exhaustive
FORMS = [LabelSmoothing(0.3), DynamicFineTuning(), EntropyAdaptive(0.7)]
LAYOUTS = {
    1: [{}],
    2: [{"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
}


def weigh(stats):
    return torch.where(stats.domain_ids == 0, 0.5, 1.5)


def trained(parallel_info, cases):
    """Of each case: objectives, losses and gradient norms of three steps, then losses and gradient scores."""
    return [_trained(parallel_info, *case) for case in cases]


def _trained(parallel_info, form, keys):
    build = fsdp_engine if keys is None else megatron_engine
    engine = build(parallel_info, "llama", "single" if keys is None else keys, loss_form=form)
    parallel_info, rows = engine.parallel_info, []
    for step in range(3):
        stats = engine.train_step(make_micro_batches(parallel_info, samples(step, 8), 2), weigh)
        rows += [stats.loss, stats.mean_loss, stats.grad_norm]
    (batch,) = make_micro_batches(parallel_info, samples(9, 8), 8)
    rows += engine.sample_losses(batch).loss_sum.tolist()
    rows += engine.gradient_gram([[batch]]).flatten().tolist()
    if not (keys or {}).get("context_parallel_size"):
        scorer = engine.gradient_scorer(adam=False)
        rows += scorer.score(batch, scorer.directions([[batch]]))[1].tolist()
    return rows


@pytest.fixture(scope="module")
def expected():
    cases = [(form, None) for form in [*FORMS, None]]
    *of_forms, plain = map(torch.tensor, runs.run_forked(trained, 1, cases)[0])
    return of_forms, plain


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_gives_the_fsdp_engines_numbers(expected, world):
    of_forms, plain = expected
    cases = [(form, keys) for form in FORMS for keys in LAYOUTS[world]]
    results = runs.run_forked(trained, world, cases)[0]
    for number, ((form, keys), result) in enumerate(zip(cases, results, strict=True)):
        reference = of_forms[number // len(LAYOUTS[world])][: len(result)]
        torch.testing.assert_close(
            torch.tensor(result), reference, rtol=1e-4, atol=1e-5, msg=lambda m, c=(form, keys): f"{c}: {m}"
        )
        assert not torch.allclose(reference[0], plain[0], rtol=1e-3) and torch.allclose(reference[1], plain[1])
