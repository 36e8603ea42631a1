"""Files that some algorithms require, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.unit.algorithms import test_contract as contract
from tests.unit.algorithms.examples import DOMAINS


@pytest.fixture(scope="session", autouse=True)
def offline_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neighbours and chances that name every sample of DOMAINS."""
    folder, samples, rng = tmp_path_factory.mktemp("offline"), sum(DOMAINS.num_samples), np.random.default_rng(0)
    np.save(folder / "indices.npy", rng.permutation(samples).reshape(5, -1))
    np.save(folder / "probs.npy", rng.random(samples) + 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contract.SPECS, "selector.near", {"indices_path": str(folder / "indices.npy")})
        patch.setitem(contract.SPECS, "selector.tsds", {"probs_path": str(folder / "probs.npy")})
        yield
