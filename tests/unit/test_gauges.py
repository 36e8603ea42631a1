"""Memory and MFU, against numbers counted by hand."""

from pathlib import Path

import pytest
from torch import nn

from dataflex_mega import gauges


def test_memory_is_what_the_kernel_says():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = int(status["VmHWM"].split()[0])
    assert gauges.memory()["memory/peak_rss_gib"] == pytest.approx(kib / 2**20, rel=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 9.89e14), ("NVIDIA H100 PCIe", 7.56e14), ("NVIDIA A100-SXM4-80GB", 3.12e14),
     ("NVIDIA H200", 9.89e14), ("NVIDIA H20", 1.48e14), ("NVIDIA L40S", 3.62e14), ("Tesla T4", 6.5e13), ("New", None)],
)  # fmt: skip
def test_the_peak_of_a_gpu(name, peak):
    assert gauges.peak_flops(name) == peak


class Model(nn.Module):
    """2 x 3 weights that train and 3 x 5 that do not."""

    def num_parameters(self, only_trainable=False, exclude_embeddings=False):
        assert exclude_embeddings
        return 6 if only_trainable else 21


def test_a_step_costs_six_operations_for_a_trained_weight_and_four_for_a_frozen_one():
    assert gauges.flops_per_token(Model()) == 6 * 6 + 4 * 15
    assert gauges.flops_per_token(nn.Linear(1, 1)) is None
    assert gauges.mfu_per_token_rate(Model(), False, 2) is None
