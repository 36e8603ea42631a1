"""What becomes of every key of LLaMA-Factory in a dynamic run: one table, and the check of a configuration against it.

A key that is not in the table is a mistake, which a test finds by walking the argument classes of the installed
LLaMA-Factory and transformers. Static runs are LLaMA-Factory's, and nothing here is about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex_mega.config.fate import Fate, is_one_of
from dataflex_mega.config.fates_data import DATA_FATES, GENERATING_FATES
from dataflex_mega.config.fates_finetuning import FINETUNING_FATES
from dataflex_mega.config.fates_model import MODEL_FATES
from dataflex_mega.config.fates_newer import NEWER_FATES
from dataflex_mega.config.fates_training import TRAINING_FATES
from dataflex_mega.errors import ConfigError, did_you_mean

# Name of LLaMA-Factory's argument class -> the fates of its keys.
TABLES: dict[str, dict[str, Fate]] = {
    "ModelArguments": MODEL_FATES,
    "DataArguments": DATA_FATES,
    "TrainingArguments": TRAINING_FATES,
    "FinetuningArguments": FINETUNING_FATES,
    "GeneratingArguments": GENERATING_FATES,
}
FATES: dict[str, Fate] = {**NEWER_FATES, **{key: fate for table in TABLES.values() for key, fate in table.items()}}


def check_fates(
    values: Mapping[str, Any], fates: Mapping[str, Fate] = FATES, who: str = "dynamic training"
) -> list[str]:
    """Notes on the keys that have no effect, one line for each reason.

    Args:
        values: LLaMA-Factory's keys of a configuration.
        fates: those that are checked.
        who: in messages, what does not act on a key.

    Raises ConfigError for a key that would change what is computed or left behind, and for a value that is not taken.
    """
    without_effect: dict[str, list[str]] = {}
    for key, value in values.items():
        if key not in fates:
            continue
        fate = fates[key]
        if fate.takes:
            _check_value(key, value, fate)
        elif fate.is_harmless(value):
            pass
        elif fate.verb == "refused":
            found = f"{value!r}: " if fate.names_value else ""
            raise ConfigError(f"{key}: {found}{who} does not do this; {fate.why}")
        elif fate.verb == "noted":
            without_effect.setdefault(f"no effect in {who}; {fate.why}", []).append(key)
        elif fate.switch is not None and not fate.switch.is_on(values):
            without_effect.setdefault(f"no effect without {fate.switch}", []).append(key)
    return [f"{', '.join(keys)}: {'has' if len(keys) == 1 else 'have'} {why}" for why, keys in without_effect.items()]


def _check_value(key: str, value: Any, fate: Fate) -> None:
    if not is_one_of(value, fate.takes):
        near = did_you_mean(value, fate.names_taken) if isinstance(value, str) else ""
        taken = ", ".join(fate.names_taken)
        raise ConfigError(f"{key}: dynamic training takes {taken}, found {value!r}{near}; {fate.why}")
