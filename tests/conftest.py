"""Settings for all tests: one thread per process, no network, and no GPU unless tests/gpu runs alone."""

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

    gpu_tests = Path(__file__).parent / GPU_TESTS
    requested = [Path(config.invocation_params.dir, str(arg).split("::")[0]).resolve() for arg in config.args]
    if not requested or not all(gpu_tests == path or gpu_tests in path.parents for path in requested):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet
