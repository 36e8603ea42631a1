"""What gradient scores refuse on the Megatron engine, in one line each."""

from types import SimpleNamespace

import pytest
import torch

from dataflex_mega.errors import ConfigError

pytest.importorskip("megatron.core")
from dataflex_mega.engines.megatron.gradient_hooks import MicroBatchSpans
from dataflex_mega.engines.megatron.gradient_scorer import check_layout
from dataflex_mega.engines.megatron.layout import MegatronLayout
from dataflex_mega.engines.megatron.moments import DistributedAdamMoments
from dataflex_mega.signals.per_sample_gradients import SampleSpan


def engine(world=1, sizes=None, **keys):
    config = {"transformer_impl": "local", "fp16": False, "num_moe_experts": None, **keys}
    return SimpleNamespace(config=SimpleNamespace(**config), layout=MegatronLayout(world, **(sizes or {})))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (engine(transformer_impl="transformer_engine"), "transformer_impl: gradient scores need local"),
        (engine(fp16=True), "fp16: gradient scores would underflow"),
        (
            engine(4, {"tensor": 4, "expert": 2}, num_moe_experts=4),
            r"experts 2 x expert tensor 1 must be a multiple of tensor_model_parallel_size 4",
        ),
    ],
)
def test_what_would_give_other_numbers_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(made)


@pytest.mark.parametrize("sizes", [{"tensor": 2, "expert": 2}, {"tensor": 4, "expert_tensor": 4}, {"expert": 4}])
def test_experts_that_see_whole_samples_are_fine(sizes):
    check_layout(engine(4, sizes, num_moe_experts=4))


def test_an_optimizer_without_moments_is_refused():
    part = SimpleNamespace(config=SimpleNamespace(optimizer="sgd"))
    with pytest.raises(ConfigError, match="gradient_type: adam needs optim: adamw_torch, found sgd"):
        DistributedAdamMoments.from_optimizer(SimpleNamespace(chained_optimizers=[part]), torch.device("cpu"))


def test_a_micro_batch_is_known_by_spans_and_by_positions_first():
    micro = MicroBatchSpans.from_segment_ids(torch.tensor([[3, 3, 5, -1], [4, 4, 4, 4]]))
    assert micro.spans == [SampleSpan(3, 0, 0, 2), SampleSpan(5, 0, 2, 3), SampleSpan(4, 1, 0, 4)]
    assert micro.samples.tolist() == [[3, 4], [3, 4], [5, 4], [-1, 4]]
