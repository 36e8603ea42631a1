"""What LLaMA-Factory's own training is given."""

import os

from dataflex_mega.llamafactory.static import on_this_machine


def test_the_token_of_the_hub_is_no_argument_that_transformers_stores(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    given = {"hub_token": "abcdef123", "seed": 1}
    assert on_this_machine(given) == {"seed": 1} and os.environ["HF_TOKEN"] == "abcdef123"
    assert on_this_machine({"seed": 1}) == {"seed": 1} and os.environ["HF_TOKEN"] == "abcdef123"
    assert given == {"hub_token": "abcdef123", "seed": 1}
