"""What all tests share: one thread a process, no network, and no GPU but for a run of tests/gpu alone."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import torch

torch.set_num_threads(1)

GPU_TESTS = "gpu"


def pytest_configure(config):
    """Tests compare with the CPU's numbers and start more processes than a machine has GPUs, so GPUs are hidden from them
    and from what they start; `pytest tests/gpu` by itself sees them."""
    from pathlib import Path

    here = Path(__file__).parent / GPU_TESTS
    asked = [Path(config.invocation_params.dir, str(arg).split("::")[0]).resolve() for arg in config.args]
    if not asked or not all(here == path or here in path.parents for path in asked):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet
