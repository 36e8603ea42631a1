"""Keeps secrets out of what is logged and written: tokens and keys of hubs and trackers, passwords, webhooks.

A secret is known by its name: that of a configuration key, at any depth, or of an environment variable; or by its place
in a URL. `learn` notes the values of a configuration, `redact` replaces them in a text, `without_secrets` removes them from
a value that is stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

HIDDEN = "***"
MIN_LENGTH = 6  # of a value that is searched for in texts; a shorter one would hide parts of words
MIN_ENVIRONMENT_LENGTH = 8
# A name is divided at every change of case and at every character that is no letter or digit.
SECRET_WORDS = frozenset(
    "secret secrets password passwords passwd passphrase webhook webhooks credential credentials apikey bearer "
    "authorization authtoken accesstoken apitoken".split()
)
# `X_key` is a secret for these X; other keys are names of columns and the like.
KEYS_OF = frozenset("api access account auth private encryption signing ssh license hub wandb swanlab".split())
# `X_token` is a secret, except for these X, which speak of text.
TOKENS_OF_TEXT = frozenset(
    "pad eos bos unk sep cls mask image video audio per last first next prev special stop start end begin eot eod eom "
    "answer label target domain new prompt response text sub word think reasoning boundary fill placeholder by each".split()
)
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/\s@'\"<>]+(?=@)")
_PASSWORD_IN_URL = re.compile(r"://[^/\s:@'\"]*:([^/\s@'\"]+)@")
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)=([^\s&'\",;)\]}]+)")  # key=value, also in a URL's query
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


@cache
def _known() -> dict[str, None]:
    """The values that were learned, as an ordered set."""
    return {}


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether what goes by this name is a secret: `hf_hub_token`, `WANDB_API_KEY`, `webhook-url`; not `max_new_tokens`."""
    divided = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word for word in re.split(r"[^a-z0-9]+", divided.lower()) if word]
    if SECRET_WORDS.intersection(words) or words[-2:] == ["connection", "string"]:
        return True
    for before, word in zip(["", *words], words, strict=False):
        if word == "key" and before in KEYS_OF:
            return True
    return bool(words) and words[-1] == "token" and (words[:-1] or [""])[-1] not in TOKENS_OF_TEXT


def learn(value: Any, secret: bool = False) -> None:
    """Note the secrets in a configuration, at any depth, so that `redact` knows them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            learn(inner, secret or is_secret_name(str(key)))
    elif isinstance(value, list | tuple):
        for inner in value:
            learn(inner, secret)
    elif isinstance(value, str):
        if secret and len(value.strip()) >= MIN_LENGTH and not value.startswith("${"):
            _known()[value.strip()] = None
        for password in _PASSWORD_IN_URL.findall(value):
            if len(password) >= MIN_LENGTH:
                _known()[password] = None


def redact(text: str) -> str:
    """The text with *** in place of every secret that is known by its value, its name or its place in a URL."""
    for value in sorted({*_known(), *_in_environment()}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _CREDENTIALS_IN_URL.sub(HIDDEN, text) if "://" in text else text
    text = _ASSIGNMENT.sub(_hide_value, text) if "=" in text else text
    return _HUB_TOKEN.sub(HIDDEN, text)


def without_secrets(value: Any) -> Any:
    """A copy for a file: keys with a secret's name left out at every depth, texts redacted."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in value.items() if not is_secret_name(str(key))}
    if isinstance(value, list | tuple):
        return type(value)(map(without_secrets, value)) if type(value) in (list, tuple) else value
    return redact(value) if isinstance(value, str) else value


def move_secrets(value: Any, name: str = "") -> tuple[Any, dict[str, str]]:
    """(a copy for a configuration file, the variables of the environment that it then needs).

    Every text that is secret, by its key or its place in a URL, becomes `${oc.env:DATAFLEX_MEGA_SECRET_KEY}`.
    """
    if isinstance(value, Mapping):
        pairs = {key: move_secrets(inner, f"{name}_{key}" if name else str(key)) for key, inner in value.items()}
        variables = {variable: secret for _, found in pairs.values() for variable, secret in found.items()}
        return {key: copy for key, (copy, _) in pairs.items()}, variables
    if isinstance(value, list):
        items = [move_secrets(inner, f"{name}_{number}") for number, inner in enumerate(value)]
        return [copy for copy, _ in items], {
            variable: secret for _, found in items for variable, secret in found.items()
        }
    if isinstance(value, str) and (is_secret_name(name.replace("_", ".")) or redact(value) != value):
        variable = "DATAFLEX_MEGA_SECRET_" + re.sub(r"[^A-Za-z0-9]+", "_", name).upper()
        return f"${{oc.env:{variable}}}", {variable: value}
    return value, {}


def _in_environment() -> list[str]:
    named = [value for name, value in os.environ.items() if is_secret_name(name)]
    return [value for value in named if len(value) >= MIN_ENVIRONMENT_LENGTH and not value.isdigit()]


def _hide_value(match: re.Match[str]) -> str:
    name = match.group(1)
    return f"{name}={HIDDEN}" if is_secret_name(name.rpartition(".")[2]) else match.group(0)
