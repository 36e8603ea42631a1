"""The result of a mixer whose averages another run draws by, in DataFlex's two files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dataflex_mega.files import atomic_write


def write_averages(folder: Path, mixer: str, names: Sequence[str], averages: tuple[int, Tensor]) -> tuple[Path, Path]:
    """`<mixer>_average_weights.json` with names, and `<mixer>_step3_proportions.txt` with numbers alone -> their paths.

    `averages`: what Mixer.average_weights returned.

    `init_mixture_proportions_file` reads either.
    """
    updates, weights = averages
    kind = mixer.rpartition(":")[2].lower()
    content = {
        "description": f"mean domain weights of {kind} over the run; init_mixture_proportions_file reads this",
        "update_times": updates,
        "domain_names": list(names),
        "average_weights": weights.tolist(),
    }
    full, bare = folder / f"{kind}_average_weights.json", folder / f"{kind}_step3_proportions.txt"
    for path, text in ((full, json.dumps(content, indent=1) + "\n"), (bare, f"{weights.tolist()}\n")):
        atomic_write(path, text)
    return full, bare
