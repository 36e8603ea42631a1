"""Batches with images: the inputs are LLaMA-Factory's, a sample's loss is its own, and no file is read twice."""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataflex_mega.data.content import content_hashes
from dataflex_mega.data.media import Media
from dataflex_mega.data.pool import Domain, SamplePool
from dataflex_mega.distributed.parallel_info import ParallelInfo
from dataflex_mega.engines.fsdp.gradient_scorer import FSDPGradientScorer
from dataflex_mega.engines.fsdp.hidden_states import layers_of
from dataflex_mega.engines.fsdp.parallel import FSDPLayout
from dataflex_mega.engines.fsdp.runner import FSDPModelRunner
from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.llamafactory.args import parse_arguments, prepare_arguments
from dataflex_mega.llamafactory.data import load_data
from dataflex_mega.llamafactory.media import MediaCollator
from dataflex_mega.llamafactory.model import load_tokenizer
from dataflex_mega.signals.sample_embeddings import sample_embeddings
from dataflex_mega.types import EmbeddingSpec
from tests.support import vision

KINDS = {"llava": ("model", "llava"), "qwen": ("qwen", "qwen2_vl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = vision.write(tmp_path_factory.mktemp("media"))
    vision.write_qwen(root / "qwen")
    return root


def arguments(folder, kind="llava", **keys):
    model, template = KINDS[kind]
    given = {
        "model_name_or_path": str(folder / model), "template": template, "stage": "sft", "dataset": "mixed",
        "dataset_dir": str(folder / "data"), "output_dir": str(folder / "out"), "cutoff_len": 160,
        "finetuning_type": "full", **keys,
    }  # fmt: skip
    return parse_arguments(prepare_arguments(given))


@pytest.fixture(scope="module", params=list(KINDS))
def parts(folder, request):
    """Model, pool and collator of a kind of model, as a run makes them."""
    import transformers

    args = arguments(folder, request.param)
    module, template = load_tokenizer(args)
    bundle = load_data(args, module, template)
    config = transformers.AutoConfig.from_pretrained(folder / KINDS[request.param][0])
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / KINDS[request.param][0]).eval()
    pool = SamplePool(bundle.domains)
    collator = MediaCollator.build(args, module, template, config, module["tokenizer"].pad_token_id)
    return SimpleNamespace(model=model, pool=pool, collator=collator, template=template, module=module)


def losses(model, batch):
    """Summed token losses of each row, by torch alone."""
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, use_cache=False, **batch.extra).logits
    return sums(logits, batch.labels)


def sums(logits, labels):
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)


def test_a_sample_has_in_a_batch_the_loss_that_it_has_alone(parts):
    samples = parts.pool.fetch(np.arange(12))
    assert {len(sample.media.images) for sample in samples} == {0, 1, 2}
    together = losses(parts.model, parts.collator(samples))
    alone = torch.cat([losses(parts.model, parts.collator([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_losses_are_those_of_llama_factorys_own_collator(parts):
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    theirs = SFTDataCollatorWith4DAttentionMask(template=parts.template, model=parts.model, **parts.module)
    samples = parts.pool.fetch(np.arange(12))
    rows = [
        {
            "input_ids": s.input_ids.tolist(), "attention_mask": [1] * len(s.input_ids), "labels": s.labels.tolist(),
            "images": list(s.media.images), "videos": None, "audios": None,
        }
        for s in samples
    ]  # fmt: skip
    features = theirs(rows)
    labels = features.pop("labels")
    with torch.no_grad():
        logits = parts.model(**{k: v for k, v in features.items() if k != "rope_deltas"}, use_cache=False).logits
    expected = sums(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(losses(parts.model, parts.collator(samples)), expected, rtol=1e-5, atol=1e-5)


def test_a_picture_decides_the_loss(parts, tmp_path):
    sample = parts.pool.fetch(np.array([1]))[0]
    with Image.open(sample.media.images[0]) as picture:
        Image.new("RGB", picture.size, "gray").save(tmp_path / "other.png")
    other = replace(sample, media=Media(images=(str(tmp_path / "other.png"),)))
    first, second = (float(losses(parts.model, parts.collator([one]))) for one in (sample, other))
    assert abs(first - second) > 1e-6


def test_words_alone_run_the_tower_and_have_the_losses_of_words_alone(parts):
    samples = [sample for sample in parts.pool.fetch(np.arange(12)) if not sample.media]
    batch = parts.collator(samples)
    assert batch.extra["pixel_values"].shape[0] > 0
    with torch.no_grad():
        plain = parts.model(input_ids=batch.input_ids, use_cache=False)
    lengths = [len(sample.input_ids) for sample in samples]
    assert (batch.segment_ids >= 0).sum(1).tolist() == lengths
    shortest = int(np.argmin(lengths))
    assert int((batch.input_ids[shortest] != parts.collator.pad_id).sum()) > lengths[shortest], (
        "behind the shortest row"
    )
    keep = torch.where(batch.segment_ids >= 0, batch.labels, -100)
    torch.testing.assert_close(losses(parts.model, batch), sums(plain.logits, keep), rtol=1e-5, atol=1e-5)


def test_each_file_of_a_batch_is_read_once(parts, monkeypatch):
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    samples = parts.pool.fetch(np.arange(12))
    shown = [str(image) for sample in samples for image in sample.media.images]
    parts.collator(samples)
    assert sorted(opened) == sorted(set(shown)) and len(shown) > len(opened)


def test_a_file_that_is_gone_is_named(parts, folder, tmp_path):
    sample = replace(parts.pool.fetch(np.array([1]))[0], media=Media(images=(str(tmp_path / "gone.png"),)))
    with pytest.raises(DataError, match=r"gone\.png cannot be read any more"):
        parts.collator([sample])


def test_layers_are_those_of_the_language_model(parts):
    assert len(layers_of(parts.model)) == 2
    assert all("Decoder" in type(layer).__name__ for layer in layers_of(parts.model))


# -- gradients of samples --------------------------------------------------------------------------------------------------


def scorer_of(parts, **trained):
    """A scorer of the model in which parameters train whose names contain none of `frozen`."""
    model = copy.deepcopy(parts.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in trained["frozen"]))
    runner = FSDPModelRunner(model, FSDPLayout("single"), ParallelInfo(0, 1, torch.device("cpu"), 0, 1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return runner, FSDPGradientScorer(runner, optimizer, adam=False)


TOWERS = ("vision_tower", "multi_modal_projector", "visual")


def test_gradient_norms_are_those_of_autograd(parts):
    runner, scorer = scorer_of(parts, frozen=TOWERS)
    samples = parts.pool.fetch(np.arange(6))
    directions = scorer.directions([[parts.collator(samples[:2])]])
    _, norm2 = scorer.score(parts.collator(samples), directions)
    weights = [linear.weight for linear in scorer.linears.values()]
    for sample, found in zip(samples, norm2.tolist(), strict=True):
        batch = parts.collator([sample])
        mean = runner.token_losses(batch).sum() / (batch.labels >= 0).sum()
        gradients = torch.autograd.grad(mean, weights)
        assert found == pytest.approx(sum(float(g.square().sum()) for g in gradients), rel=1e-4)


@pytest.mark.parametrize("trained", ["tower", "projector"])
def test_layers_over_pictures_have_no_gradients_of_samples(parts, trained):
    parts_of = {"tower": ("multi_modal_projector", "visual.merger"), "projector": ("vision_tower", "visual.blocks")}
    with pytest.raises(ConfigError, match="trains, whose inputs are images.*freeze_vision_tower"):
        scorer_of(parts, frozen=parts_of[trained])


# -- rows ------------------------------------------------------------------------------------------------------------------


def hash_of(folder):
    args = arguments(folder, dataset="colours")
    rows = load_data(args, *load_tokenizer(args)).domains[0]
    (found,) = content_hashes(SamplePool([Domain("d", rows.rows)]), 0, 1, lambda own: [own]).values()
    return found


def test_a_run_is_told_by_its_pictures_and_not_by_their_folder(folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    before = hash_of(folder)
    assert hash_of(moved) == before
    Image.new("RGB", (40, 33), "pink").save(moved / "data" / "pictures" / "red.png")
    assert hash_of(moved) != before


def broken(data, kind):
    """Break the sixth row of `colours` -> what the message must say."""
    rows = [vision.row(n, 1) for n in range(8)]
    picture = data / "pictures" / "broken.png"
    rows[5]["images"] = ["pictures/broken.png"]
    if kind == "no image":
        picture.write_text("these are words")
    elif kind == "truncated":
        whole = (data / "pictures" / "red.png").read_bytes()
        picture.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        picture.write_bytes(b"")
    elif kind == "one too many":
        rows[5]["images"] = ["pictures/red.png", "pictures/red.png"]
    elif kind == "none":
        rows[5]["images"] = []
    elif kind == "no placeholder":
        rows[5]["messages"][0]["content"] = "what is it?"
        rows[5]["images"] = ["pictures/red.png"]
    vision.write_rows(data, "colours", rows)
    return {
        "missing": "broken.png not found in media_dir", "one too many": "2 images and 1 <image>",
        "none": "0 images and 1 <image>", "no placeholder": "1 images and 0 <image>",
    }.get(kind, "broken.png cannot be read")  # fmt: skip


KINDS_OF_BREAKS = ("missing", "no image", "truncated", "empty", "one too many", "none", "no placeholder")


@pytest.mark.parametrize("kind", KINDS_OF_BREAKS)
def test_a_broken_row_is_named_with_file_and_row(folder, tmp_path, kind):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    expected = broken(data, kind)
    args = arguments(folder, dataset_dir=str(data), dataset="colours")
    with pytest.raises(DataError) as caught:
        load_data(args, *load_tokenizer(args))
    message = str(caught.value)
    assert expected in message and "colours.json, row 5" in message and "\n" not in message


def test_one_row_with_pictures_among_many_without_is_found(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    vision.write_rows(data, "colours", [vision.row(n, int(n == 299)) for n in range(300)])
    args = arguments(folder, dataset_dir=str(data), dataset="colours")
    assert load_data(args, *load_tokenizer(args)).media == {"colours": ("images",)}


def test_a_template_without_pictures_is_refused(folder):
    args = arguments(folder, dataset="colours")
    args.data.template = "default"
    with pytest.raises(ConfigError, match=r"template: default takes no images.*colours\.json, row 0"):
        load_data(args, *load_tokenizer(args))


def test_videos_without_a_processor_for_them_are_refused(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    info = json.loads((data / "dataset_info.json").read_text())
    info["colours"]["columns"]["videos"] = "videos"
    (data / "dataset_info.json").write_text(json.dumps(info))
    rows = [{**vision.row(n, 1), "videos": ["v.mp4"]} for n in range(3)]
    vision.write_rows(data, "colours", rows)
    args = arguments(folder, "qwen", dataset_dir=str(data), dataset="colours")
    with pytest.raises(ConfigError, match=r"colours\.json, row 0 has videos.*dataflex_mega\[vision\]"):
        load_data(args, *load_tokenizer(args))


def test_image_tokens_and_text_tokens_have_means_of_their_own(parts):
    samples = parts.pool.fetch(np.arange(6))
    batch = parts.collator(samples)
    hidden = torch.randn(*batch.input_ids.shape, 5, generator=torch.Generator().manual_seed(0))
    found = {
        tokens: sample_embeddings(hidden, batch, EmbeddingSpec(normalize=False, tokens=tokens))
        for tokens in ("media", "text", "all")
    }
    token = getattr(parts.collator.config, "image_token_id", None)
    for row, sample in enumerate(samples):
        is_image = torch.tensor(sample.input_ids == token)
        states = hidden[row, : len(is_image)]
        expected = states[is_image].mean(0) if is_image.any() else torch.zeros(5)
        torch.testing.assert_close(found["media"][row], expected)
        torch.testing.assert_close(found["text"][row], states[~is_image].mean(0))
        torch.testing.assert_close(found["all"][row], states.mean(0))
        assert bool(is_image.any()) == bool(sample.media)
