"""Every key is known to decide, to be free, or to be secret; and what is stored has no secret."""

import pytest

from dataflex_mega.config import identity
from dataflex_mega.config.parse import MEGATRON_KEYS, OUR_KEYS, parse_config
from dataflex_mega.llamafactory.args import argument_types
from dataflex_mega.redaction import is_secret_name

LISTS = ("DECIDES", "FREE_KEYS", "SECRET_KEYS", "LAYOUT_KEYS", "AFFECTS_RESULTS")


@pytest.fixture(scope="module")
def every_key():
    return {*argument_types(), *OUR_KEYS, *MEGATRON_KEYS}


def test_every_key_of_the_installed_versions_is_in_exactly_one_list(every_key):
    places = {key: [name for name in LISTS if key in getattr(identity, name)] for key in every_key}
    assert {key: found for key, found in places.items() if len(found) != 1} == {}


def test_no_list_has_a_key_that_does_not_exist(every_key):
    listed = set().union(*(getattr(identity, name) for name in LISTS))
    assert listed - every_key == set()


def test_a_key_is_secret_exactly_when_its_name_says_so(every_key):
    assert {key for key in every_key if is_secret_name(key)} == identity.SECRET_KEYS


def identity_of(lf_keys, **keys):
    config = parse_config({"stage": "pt", "seed": 1, **keys}, argument_types())
    return identity.identity(config, 8, {"code": "1"}, config.roles)


def test_what_decides_is_stored_and_a_secret_is_not(lf_keys):
    token = "SECRETTOKEN123"
    found = identity_of(
        lf_keys, hf_hub_token=token, hub_token=token, swanlab_api_key=token, swanlab_lark_webhook_url=f"https://x/{token}",
        learning_rate=0.1, output_dir="x", extra_config={"api_key": token, "depth": {"password": token, "kept": 1}},
        lr_scheduler_kwargs={"hub": f"https://user:{token}@host/x"}, model_name_or_path=f"https://host/m?token={token}",
    )  # fmt: skip
    assert token not in repr(found)
    assert found["learning_rate"] == 0.1 and found["seed"] == 1 and found["extra_config"] == {"depth": {"kept": 1}}
    assert "output_dir" not in found and not identity.SECRET_KEYS & set(found)


def test_a_renewed_token_gives_the_same_identity(lf_keys):
    one, two = (
        identity_of(lf_keys, hf_hub_token=token, lr_scheduler_kwargs={"address": f"https://me:{token}@host"})
        for token in ("FIRSTTOKEN1", "SECONDTOKEN2")
    )
    assert one == two
