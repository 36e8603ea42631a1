"""Secrets are known by their names, their places in URLs and their values."""

import logging

import pytest

from dataflex_mega import log, redaction

SECRET = (
    "hf_hub_token hub_token ms_hub_token om_hub_token swanlab_api_key swanlab_lark_secret swanlab_lark_webhook_url token "
    "HF_TOKEN HUGGING_FACE_HUB_TOKEN WANDB_API_KEY SWANLAB_API_KEY MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_TOKEN "
    "AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN MODELSCOPE_API_TOKEN COMET_API_KEY NEPTUNE_API_TOKEN "
    "GITHUB_TOKEN apiKey accessToken api-key password db_password bearer_token auth_token webhook client_secret "
    "AZURE_STORAGE_CONNECTION_STRING"
).split()
PLAIN = (
    "max_new_tokens skip_special_tokens add_tokens tokenizer token_id key sort_key text_key keys pad_token eos_token "
    "ignore_pad_token_for_loss calculate_per_token_loss moe_token_dispatcher_type tokens_per_step keyword monkey "
    "include_num_input_tokens_seen PWD HOME SSH_AUTH_SOCK PATH tokenized_path split_special_tokens"
).split()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    known = {}
    monkeypatch.setattr(redaction, "_known", lambda: known)
    return known


@pytest.mark.parametrize("name", SECRET)
def test_secret_names(name):
    assert redaction.is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names(name):
    assert not redaction.is_secret_name(name)


def test_a_learned_value_is_hidden_wherever_it_stands():
    redaction.learn({"a": [{"hub_token": "abcdef123"}], "api_key": ["key-in-a-list"], "plain": "visible"})
    text = redaction.redact("401 for abcdef123 and key-in-a-list at visible")
    assert text == "401 for *** and *** at visible"


def test_short_values_do_not_hide_parts_of_words(fresh):
    redaction.learn({"token": "a", "hub_token": True, "password": None, "secret": "${oc.env:HF_TOKEN}"})
    assert not fresh


def test_variables_of_the_environment(monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "environment-token")
    monkeypatch.setenv("SOMETHING_ELSE", "harmless-value")
    assert redaction.redact("environment-token harmless-value") == "*** harmless-value"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pass@host/x", "https://***@host/x"),
        ("s3://AKIA@bucket/x y@z", "s3://***@bucket/x y@z"),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        ("override 'hub_token=abc': no", "override 'hub_token=***': no"),
        ("mixer.api_key=abc learning_rate=0.1", "mixer.api_key=*** learning_rate=0.1"),
        ("hf_" + "a1B2" * 9, "***"),
        ("max_new_tokens=5, eos_token=</s>", "max_new_tokens=5, eos_token=</s>"),
        ("mail me@host.org about https://host/@x", "mail me@host.org about https://host/@x"),
    ],
)
def test_places(text, expected):
    assert redaction.redact(text) == expected


def test_a_stored_copy_has_no_secret_and_the_original_stays():
    value = {"a": 1, "hub_token": "x", "deep": [{"password": "y", "b": (1, "https://u:p@h")}]}
    assert redaction.without_secrets(value) == {"a": 1, "deep": [{"b": (1, "https://***@h")}]}
    assert value["hub_token"] == "x"


def test_the_logger_hides_what_it_is_given_in_messages_arguments_and_traces(capsys):
    redaction.learn({"hub_token": "abcdef123"})
    logger = log.get_logger()
    logger.error("error: %s", ValueError("abcdef123 refused"))
    try:
        raise ValueError("abcdef123")
    except ValueError:
        logger.exception("https://a:b@c")
    shown = capsys.readouterr().err
    assert "abcdef123" not in shown and "a:b" not in shown and shown.count("***") >= 3 and "Traceback" in shown


def test_handlers_of_libraries_are_guarded():
    redaction.learn({"hub_token": "abcdef123"})
    logger, lines = logging.getLogger("huggingface_hub"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        log.guard_libraries()
        log.guard_libraries()
        logger.error("denied for %s", "abcdef123")
    finally:
        logger.removeHandler(handler)
    assert lines == ["denied for ***"] and len(handler.filters) == 1


def test_secrets_of_a_file_move_into_the_environment():
    from omegaconf import OmegaConf

    config = {
        "hub_token": "abcdef123",
        "max_new_tokens": 5,
        "pad_token": "<pad>",
        "deep": {"list": ["https://u:p@h", 1]},
    }
    copy, variables = redaction.move_secrets(config)
    assert copy == {
        "hub_token": "${oc.env:DATAFLEX_MEGA_SECRET_HUB_TOKEN}",
        "max_new_tokens": 5,
        "pad_token": "<pad>",
        "deep": {"list": ["${oc.env:DATAFLEX_MEGA_SECRET_DEEP_LIST_0}", 1]},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert OmegaConf.to_container(OmegaConf.create(copy), resolve=True) == config
    assert all(redaction.is_secret_name(name) for name in variables)
