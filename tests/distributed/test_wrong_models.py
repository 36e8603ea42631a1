"""The model is the one that was asked for: what does not fit ends in one line before it is built."""

import json
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from tests.support import corpus, runs

MIX = {"mixer": {"name": "static"}, "warmup_step": 1, "update_step": 2, "update_times": -1}
SFT = {"stage": "sft", "dataset": "sft", "template": "default"}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}
WEIGHTS = "model.safetensors"


def copy_of(folder, name, change=None, source="model", **config):
    """A copy of a model with another config.json, and what `change` does to the folder."""
    target = folder / name
    shutil.copytree(folder / source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change is not None:
        change(target)
    return target


def without(*parts):
    """Weights whose names have one of `parts` are removed."""

    def change(target):
        weights = load_file(target / WEIGHTS)
        kept = {name: w for name, w in weights.items() if not any(part in name for part in parts)}
        assert len(kept) < len(weights)
        save_file(kept, target / WEIGHTS, metadata={"format": "pt"})

    return change


def cut(target):
    data = (target / WEIGHTS).read_bytes()
    (target / WEIGHTS).write_bytes(data[: len(data) // 2])


def broken_header(target):
    data = (target / WEIGHTS).read_bytes()
    (target / WEIGHTS).write_bytes(b"\xff" * 60 + data[60:])


def pickled(target):
    (target / WEIGHTS).unlink()
    torch.save({"weights": json.loads}, target / "pytorch_model.bin")


def no_json(target):
    (target / "config.json").write_text("{broken")


def no_tokenizer(target):
    (target / "tokenizer.json").write_text("{broken")


def small_embedding(target):
    weights = load_file(target / WEIGHTS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:100].clone()
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


def learned(folder, name, model):
    model.save_pretrained(folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / file, folder / name / file)


def adapter(folder, name, change=None, **config):
    """An adapter for the model, and what `change` does to its weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folder / name)
    path = folder / name / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if change is not None:
        change(folder / name)


def without_last_layer(target):
    file = target / "adapter_model.safetensors"
    kept = {name: w for name, w in load_file(file).items() if "layers.1." not in name}
    save_file(kept, file, metadata={"format": "pt"})


def cut_adapter(target):
    file = target / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = corpus.write(tmp_path_factory.mktemp("wrong"))
    copy_of(root, "four", num_hidden_layers=4)
    copy_of(root, "one", num_hidden_layers=1)
    copy_of(root, "headless", without("lm_head"), tie_word_embeddings=False)
    copy_of(root, "no-norm", without("layers.1.input_layernorm"))
    copy_of(root, "wide", intermediate_size=128)
    copy_of(root, "vocabulary", vocab_size=1000)
    copy_of(root, "few-rows", small_embedding, vocab_size=100)
    for name, change in (("cut", cut), ("header", broken_header), ("pickled", pickled), ("no-json", no_json)):
        copy_of(root, name, change)
    copy_of(root, "no-tokenizer", no_tokenizer)
    copy_of(root, "unknown-type", model_type="llamma")
    copy_of(root, "quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    copy_of(root, "quantised-awq", quantization_config={"quant_method": "awq", "bits": 4})
    copy_of(root, "short", max_position_embeddings=16)
    common = {"vocab_size": 512, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    learned(root, "gpt2", GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, **common)))
    opt = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=24, **common,
    )  # fmt: skip
    learned(root, "opt", OPTForCausalLM(opt))
    adapter(root, "adapter")
    adapter(root, "adapter-short", without_last_layer)
    adapter(root, "adapter-cut", cut_adapter)
    adapter(root, "adapter-rank", r=8)
    adapter(root, "adapter-fewer", target_modules=["q_proj"])
    adapter(root, "adapter-pissa", init_lora_weights="pissa_niter_4")
    return root


MODEL = "model_name_or_path"
# name -> (keys, what the line must contain); the value of a key that names a model is a folder of the fixture
CASES = {
    "layers missing": ({MODEL: "four"}, [MODEL, "four", "model.layers.2.", "random"]),
    "layers left over": ({MODEL: "one"}, [MODEL, "one", "model.layers.1.", "dropped"]),
    "head missing": ({MODEL: "headless"}, [MODEL, "headless", "lm_head.weight"]),
    "norm missing": ({MODEL: "no-norm"}, [MODEL, "model.layers.1.input_layernorm.weight"]),
    "wider": ({MODEL: "wide"}, [MODEL, "mlp", "shape", "128"]),
    "other vocabulary": ({MODEL: "vocabulary"}, [MODEL, "lm_head", "512", "1000"]),
    "cut": ({MODEL: "cut"}, [MODEL, "cut", WEIGHTS]),
    "header": ({MODEL: "header"}, [MODEL, "header", WEIGHTS]),
    "pickled": ({MODEL: "pickled"}, [MODEL, "pickled"]),
    "config.json": ({MODEL: "no-json"}, [MODEL, "no-json", "config.json"]),
    "tokenizer": ({MODEL: "no-tokenizer"}, [MODEL, "no-tokenizer", "tokenizer"]),
    "model type": ({MODEL: "unknown-type"}, [MODEL, "llamma"]),
    "quantised": ({MODEL: "quantised", **LORA}, [MODEL, "quantised with gptq", "pip install gptqmodel"]),
    "quantised AWQ": ({MODEL: "quantised-awq", **LORA}, [MODEL, "quantised with awq", "pip install autoawq"]),
    "embedding": ({MODEL: "few-rows"}, [MODEL, "512 tokens", "100 rows", "resize_vocab"]),
    "template": ({**SFT, "template": "llama3"}, ["template 'llama3'", "512 rows", "resize_vocab"]),
    "positions": ({MODEL: "gpt2"}, ["cutoff_len", "32", "24 positions"]),
    "positions with an offset": ({MODEL: "opt"}, ["cutoff_len", "32", "24 positions"]),
    "padded positions": ({MODEL: "gpt2", "cutoff_len": 25}, ["cutoff_len", "25", "24 positions"]),
    "freeze": ({"finetuning_type": "freeze", "freeze_trainable_layers": 50}, ["freeze_trainable_layers", "50", "2 layers"]),
    "freeze first": ({"finetuning_type": "freeze", "freeze_trainable_layers": -3}, ["freeze_trainable_layers", "-3"]),
    "freeze none": ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, ["freeze_trainable_layers", "0"]),
    "freeze module": (
        {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_trainable_modules": "mpl"},
        ["freeze_trainable_modules", "mpl"],
    ),
    "lora target": ({**LORA, "lora_target": "q_proj,v_porj"}, ["lora_target", "v_porj", "v_proj"]),
    "additional target": ({**LORA, "additional_target": "lm_haed"}, ["additional_target", "lm_haed", "lm_head"]),
    "rope typo": ({"rope_scaling": "lineer"}, ["rope_scaling", "lineer", "linear"]),
    "rope without positions": ({MODEL: "gpt2", "cutoff_len": 16, "rope_scaling": "linear"}, ["rope_scaling", "gpt2"]),
    "yarn": ({MODEL: "short", "rope_scaling": "yarn"}, ["rope_scaling", "yarn", "cutoff_len 32"]),
    "pissa": ({**LORA, "pissa_init": True}, ["pissa_iter", "16", "-1"]),
    "pissa iterations": ({**LORA, "pissa_init": True, "pissa_iter": 4}, ["pissa_iter", "4", "-1"]),
    "adapter layer": ({**LORA, "adapter_name_or_path": "adapter-short"}, ["adapter_name_or_path", "layers.1."]),
    "adapter cut": ({**LORA, "adapter_name_or_path": "adapter-cut"}, ["adapter_name_or_path", "adapter_model.safetensors"]),
    "adapter rank": ({**LORA, "adapter_name_or_path": "adapter-rank"}, ["adapter_name_or_path", "shape"]),
    "adapter modules": ({**LORA, "adapter_name_or_path": "adapter-fewer"}, ["adapter_name_or_path", "v_proj"]),
    "adapter pissa": ({**LORA, "adapter_name_or_path": "adapter-pissa"}, ["adapter_name_or_path", "pissa"]),
    "merged adapter": (
        {**LORA, "adapter_name_or_path": "adapter,adapter-short", "create_new_adapter": True},
        ["adapter_name_or_path", "adapter-short", "layers.1."],
    ),
    "long attention": ({**LORA, "shift_attn": True}, ["shift_attn"]),
    "attention": ({"flash_attn": "fast"}, ["flash_attn", "fast"]),
}  # fmt: skip
BUILT = {"freeze module", "long attention", "attention"}  # what LLaMA-Factory says while it loads


def keys_of(folder, keys):
    """The keys with folders of the fixture in place of their names."""

    def path(value):
        return ",".join(str(folder / part) if (folder / part).is_dir() else part for part in value.split(","))

    named = (MODEL, "adapter_name_or_path", "reference_model")
    return {key: path(value) if key in named else value for key, value in keys.items()}


def one_line(config, words):
    status, stderr = runs.train_here(config)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1, stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_does_not_fit_ends_in_one_line(folder, name):
    from dataflex_mega.run import fsdp_factory

    keys, words = CASES[name]
    config = runs.base(folder, output_dir=str(folder / "out"), **{**MIX, **keys_of(folder, keys)})
    built = AssertionError("the model was built before the mistake was found")
    patch = mock.patch.object(fsdp_factory, "build_model", side_effect=built)
    with patch if name not in BUILT else mock.MagicMock():
        one_line(config, words)


@pytest.mark.parametrize(
    ("model", "words"),
    [("four", ["model.layers.2."]), ("one", ["model.layers.1."]), ("cut", [WEIGHTS]), ("gpt2", ["cutoff_len", "24"])],
)
def test_a_reference_model_that_does_not_fit_ends_in_one_line(folder, model, words):
    mixer = {"mixer": {"name": "doremi"}, "reference_model": str(folder / model)}
    config = runs.base(folder, output_dir=str(folder / f"reference-{model}"), **{**MIX, **mixer})
    one_line(config, ["reference_model", *words] if model != "gpt2" else words)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["layers missing", "layers left over", "wider", "cut"])
def test_the_megatron_engine_refuses_the_same_models(folder, name):
    pytest.importorskip("megatron.core")
    keys, words = CASES[name]
    config = runs.base(folder, output_dir=str(folder / "out"), **{**MIX, **keys_of(folder, keys), "engine": "megatron"})
    one_line(config, words)


def test_what_fits_is_let_through(folder):
    """Only what needs no weights, fewer modules, or has other names than the model."""
    from dataflex_mega.llamafactory.args import parse_arguments, prepare_arguments
    from dataflex_mega.llamafactory.model import load_tokenizer
    from dataflex_mega.llamafactory.model_checks import check_model

    def check(**keys):
        config = runs.base(folder, **keys_of(folder, keys))
        for key in ("tensorboard",):
            config.pop(key)
        args = parse_arguments(prepare_arguments(config))
        return check_model(args, load_tokenizer(args)[0]["tokenizer"])

    assert check() == []
    assert check(**{MODEL: "four", "train_from_scratch": True}) == []
    assert check(**LORA, adapter_name_or_path="adapter") == []
    assert check(**{**LORA, "adapter_name_or_path": "adapter,adapter", "create_new_adapter": True}) == []
    assert check(**{**LORA, "lora_target": "q_proj,mlp.down_proj", "additional_target": "lm_head"}) == []
    assert check(**{MODEL: "few-rows", "resize_vocab": True}) == []
    assert check(**{MODEL: "gpt2", "cutoff_len": 24}) == []
    assert len(check(**{MODEL: "short"})) == 1  # a note: more than the model was made for
