"""Equal steps on 1, 2 and 4 processes, for every accumulation, with DDP and FSDP2, full and LoRA."""

import pytest
import torch

from dataflex_mega.distributed.testing import run_distributed_test
from tests.distributed.layouts import run_cases

pytestmark = pytest.mark.exhaustive

WEIGHED = {
    1: [("single", 8, False), ("single", 2, False), ("single", 4, True), ("fsdp2", 8, False)],
    2: [("ddp", 4, False), ("ddp", 1, True), ("fsdp2", 2, False)],
    4: [("ddp", 1, False), ("fsdp2", 2, False)],
}


def cases_of(world):
    return [
        {"mode": mode, "micro": micro, "pack": pack, "lora": lora}
        for lora in (False, True)
        for mode, micro, pack in WEIGHED[world]
    ]


@pytest.fixture(scope="module")
def expected():
    alone = [{"mode": "single", "micro": 8, "lora": lora} for lora in (False, True)]
    return dict(zip((False, True), map(torch.tensor, run_distributed_test(run_cases, 1, alone)[0]), strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_gives_the_same_losses_norms_and_sums(expected, world):
    cases = cases_of(world)
    results = run_distributed_test(run_cases, world, cases)
    assert all(rank == results[0] for rank in results), "all ranks see the same sums"
    for case, steps in zip(cases, results[0], strict=True):
        torch.testing.assert_close(torch.tensor(steps), expected[case["lora"]], rtol=1e-5, atol=1e-7, msg=str(case))
