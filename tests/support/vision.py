"""A tiny LLaVA with random weights and a few rows with small pictures, made without a download."""

import json

from PIL import Image

from dataflex_mega.demo import model as demo

IMAGE_TOKEN = "<image>"
IMAGE_SIZE, PATCH = 56, 14
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2
COLOURS = ("red", "lime", "blue", "yellow", "black", "white")
SYSTEM = (  # of template llava
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
)
SHAREGPT = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    },
}  # fmt: skip


def write(folder, seed=0):
    """`model` and `data` below `folder`: data sets `colours` (one picture a row), `pairs` (two), `words` (none)."""
    write_model(folder / "model", seed)
    data = folder / "data"
    (data / "pictures").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40 + 7 * number, 33 + 5 * number), colour).save(data / "pictures" / f"{colour}.png")
    write_rows(data, "colours", [row(n, 1) for n in range(24)])
    write_rows(data, "pairs", [row(n, 2) for n in range(20)])
    write_rows(data, "words", [row(n, 0) for n in range(16)])
    write_rows(data, "mixed", [row(n, n % 3) for n in range(12)])
    info = {name: {"file_name": f"{name}.json", **SHAREGPT} for name in ("colours", "pairs", "words", "mixed")}
    (data / "dataset_info.json").write_text(json.dumps(info))
    return folder


def row(number, pictures):
    """A question about so many pictures, and its answer."""
    colours = [COLOURS[(number * 5 + n) % len(COLOURS)] for n in range(pictures)]
    question = f"{IMAGE_TOKEN * pictures} what is number {number % 7}?"
    answer = " and ".join(colours) if colours else f"only word {number} of {number % 3}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [f"pictures/{colour}.png" for colour in colours]}


def write_rows(data, name, rows):
    """A data set of LLaMA-Factory's sharegpt format."""
    (data / f"{name}.json").write_text(json.dumps(rows))


def write_model(folder, seed=0):
    """Model, tokenizer and processor in Hugging Face layout."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1, image_seq_length=TOKENS_PER_IMAGE, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**sizes), tokenizer=tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token=IMAGE_TOKEN,
    ).save_pretrained(folder)  # fmt: skip


def make_tokenizer(*tokens):
    """The demo's tokenizer with a token for pictures, and further special tokens."""
    texts = [message["content"] for n in range(8) for message in row(n, n % 3)["messages"]]
    tokenizer = demo.make_tokenizer(texts + [SYSTEM] * 4, 420)
    tokenizer.add_special_tokens({"additional_special_tokens": [demo.START_TURN, demo.END_TURN, IMAGE_TOKEN, *tokens]})
    return tokenizer


def write_qwen(folder, seed=0):
    """A tiny Qwen2-VL, whose positions are those of a picture's grid, without what makes videos."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = make_tokenizer(*(f"<|{name}|>" for name in names))
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names]), strict=True))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": PATCH, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=IMAGE_SIZE * IMAGE_SIZE).save_pretrained(folder)
