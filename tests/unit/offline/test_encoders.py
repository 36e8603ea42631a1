"""Encoders: the mean over a sample's own tokens, whatever it is batched with; fingerprints of what was loaded."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex_mega.errors import ConfigError, UserError
from dataflex_mega.offline.encoders import EmbedInput, EncoderSettings, fingerprint, l2_normalize, load
from tests.support import corpus

CPU = torch.device("cpu")
TEXTS = ["def f(x): return x", "a", "the quick brown fox jumps over the lazy dog " * 3, ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return corpus.write(tmp_path_factory.mktemp("encoders"), hidden=16, vocab=300) / "model"


def by_hand(encoder, tokens):
    with torch.no_grad():
        found = encoder.model(torch.tensor([tokens])).last_hidden_state[0].double().mean(0).numpy()
    return found / np.linalg.norm(found)


@pytest.mark.parametrize("kind", ["encoder", "model"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_vector_is_the_mean_over_the_samples_own_tokens(model, kind, batch_size):
    encoder = load(EncoderSettings(str(model), kind, max_length=20, batch_size=batch_size), CPU)
    found = encoder([EmbedInput(text) for text in TEXTS])
    assert found.shape == (4, encoder.size) == (4, 16) and found.dtype == np.float32
    for vector, text in zip(found[:3], TEXTS, strict=False):
        tokens = encoder.tokenizer(text)["input_ids"][:20]
        np.testing.assert_allclose(vector, by_hand(encoder, tokens), atol=1e-5)
    assert np.isfinite(found).all()


def test_the_model_being_trained_takes_the_tokens_themselves(model):
    items = [EmbedInput("not this", np.array([5, 7, 11, 13])), EmbedInput("nor this", np.array([9]))]
    encoder = load(EncoderSettings(str(model), "model"), CPU)
    np.testing.assert_allclose(encoder(items)[0], by_hand(encoder, [5, 7, 11, 13]), atol=1e-5)
    other = load(EncoderSettings(str(model), "encoder"), CPU)
    assert not np.allclose(other(items)[0], encoder(items)[0], atol=1e-3)
    with pytest.raises(UserError, match="knows 300 tokens, a sample has 300"):
        encoder([EmbedInput("", np.array([300]))])


def test_a_lora_folder_is_the_base_model_with_its_adapter(model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    adapted.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    item = EmbedInput("", np.arange(3, 20))
    encoder = load(EncoderSettings(str(tmp_path), "model"), CPU)
    with torch.no_grad():
        states = adapted.eval()(torch.arange(3, 20).unsqueeze(0), output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(encoder([item])[0], l2_normalize(states.mean(0, keepdim=True).numpy())[0], atol=1e-5)
    assert encoder.identity()["model"].endswith("+" + fingerprint(model))


def test_the_fingerprint_is_of_weights_and_configuration(model, tmp_path):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    assert fingerprint(tmp_path) == fingerprint(model)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert fingerprint(tmp_path) != fingerprint(model)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "training_args.bin").unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        fingerprint(tmp_path)


class Fake:
    """What is used of sentence_transformers.SentenceTransformer."""

    def __init__(self, name, device, trust_remote_code):
        self.name, self.max_seq_length = name, 64

    def get_sentence_embedding_dimension(self):
        return 3

    def encode(self, texts, batch_size, convert_to_numpy, show_progress_bar):
        assert convert_to_numpy and not show_progress_bar and batch_size == 32
        return np.array([[len(t), 4.0, 0.0] for t in texts])


def test_a_folder_with_modules_is_read_by_sentence_transformers(model, tmp_path, monkeypatch):
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Fake))
    encoder = load(EncoderSettings(str(tmp_path), max_length=100), CPU)
    assert encoder([EmbedInput("abc")]).tolist() == [pytest.approx([0.6, 0.8, 0.0])]
    assert encoder.size == 3 and encoder.identity()["max_length"] == 64
    assert load(EncoderSettings(str(tmp_path), normalize=False), CPU)([EmbedInput("abc")]).tolist() == [[3.0, 4.0, 0.0]]
    assert load(EncoderSettings(str(tmp_path), "encoder"), CPU).identity()["encoder"] == "encoder"
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="sentence-transformers is not installed"):
        load(EncoderSettings(str(tmp_path)), CPU)


def test_a_model_that_is_nowhere_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no_such/model is no folder"):
        load(EncoderSettings("no_such/model"), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model: .*empty"):
        load(EncoderSettings(str(tmp_path / "empty")), CPU)
