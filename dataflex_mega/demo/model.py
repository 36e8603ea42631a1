"""Make a random Llama (with `--experts` a Mixtral) and a byte-level BPE tokenizer trained on the demo data, in Hugging
Face layout.

The same text and options give the same files. For tests: `make_tokenizer` and `make_model` need no files at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dataflex_mega.errors import ConfigError, DataError
from dataflex_mega.exit_status import OneLineParser, exit_status
from dataflex_mega.files import atomic_write

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(".demo")  # of a checkout; `dataflex-cli demo` is told another
END, PAD, START_TURN, END_TURN = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, PAD, START_TURN, END_TURN)  # ids 0, 1, 2, 3
SMALLEST_VOCAB = 256 + len(SPECIAL)  # every byte has a token, so no text is unknown
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelOptions:
    """Shape of the model. `intermediate` 0 means 8/3 of `hidden`, rounded up to a multiple of 32, as Llama does it."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 4096
    intermediate: int = 0
    context: int = 2048
    tie: bool = False  # whether the output layer shares the input embedding's weights
    seed: int = 0
    experts: int = 0  # per layer, two active per token; 0 is a dense Llama

    def check(self) -> None:
        """Raises ConfigError naming the first invalid option."""
        for name in ("hidden", "layers", "heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.hidden % (2 * self.heads):
            raise ConfigError(f"--hidden {self.hidden}: must be a multiple of 2 x heads = {2 * self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"--kv-heads {self.kv_heads}: must divide heads = {self.heads}")
        if self.experts == 1 or self.experts < 0:
            raise ConfigError(f"--experts {self.experts}: must be at least 2, or 0 for none")
        if self.vocab < SMALLEST_VOCAB:
            raise ConfigError(f"--vocab {self.vocab}: must be at least {SMALLEST_VOCAB} (256 bytes, special tokens)")


def make_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens (fewer where the text has no more pairs to merge).

    Ends of text and padding are different tokens, so a loss on the end of text is not masked away with the padding.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < SMALLEST_VOCAB:
        raise ConfigError(f"vocab {vocab}: must be at least {SMALLEST_VOCAB} (256 bytes, special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START_TURN, END_TURN],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(options: ModelOptions) -> LlamaForCausalLM | MixtralForCausalLM:
    """A model with random float32 weights drawn from `seed`; the caller's random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    options.check()
    sizes = {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate or -(-options.hidden * 8 // 3 // 32) * 32,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "max_position_embeddings": options.context,
        "tie_word_embeddings": options.tie,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if options.experts:
            return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=options.experts))
        return LlamaForCausalLM(LlamaConfig(**sizes))


def save(model: LlamaForCausalLM | MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write both in Hugging Face layout into `output`. Raises ConfigError when a token would have no embedding."""
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(f"tokenizer has {len(tokenizer)} tokens, the model's vocabulary is {model.config.vocab_size}")
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)


def training_texts(data: Path) -> list[str]:
    """The `text` of every training row of a demo data folder. Raises DataError naming what is missing or broken."""
    info_file = data / "dataset_info.json"
    try:
        info = json.loads(info_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"--data: cannot read {info_file}; dataflex-cli demo makes one") from error
    texts: list[str] = []
    for name in sorted(info):
        if name.endswith("_validation") or info[name].get("columns") != {"prompt": "text"}:
            continue
        file = data / info[name]["file_name"]
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            texts += [json.loads(line)["text"] for line in lines if line]
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise DataError(f"{file}: cannot be read as JSON lines with a text field: {error}") from error
    if not texts:
        raise DataError(f"{info_file}: names no text data set to train a tokenizer on")
    return texts


def fingerprint(data: Path, options: ModelOptions) -> str:
    """Changes when the model's files could: options, this file, the text."""
    digest = hashlib.sha256(json.dumps(asdict(options)).encode() + Path(__file__).read_bytes())
    for file in sorted(data.glob("*.jsonl")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run(data: Path, output: Path, options: ModelOptions) -> int | None:
    """Write the model; returns its parameter count, or None when it exists already. Raises ConfigError, DataError."""
    options.check()
    stamp, expected = output / "tiny_model.stamp", fingerprint(data, options)
    if stamp.exists() and stamp.read_text() == expected and all((output / name).exists() for name in FILES):
        return None
    stamp.unlink(missing_ok=True)
    model = make_model(options)
    save(model, make_tokenizer(training_texts(data), options.vocab), output)
    atomic_write(stamp, expected)
    return sum(parameter.numel() for parameter in model.parameters())


def parse_arguments(argv: list[str] | None) -> tuple[Path, Path, ModelOptions]:
    """Parse the command line -> (data folder, output folder, model options)."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ModelOptions()
    parser.add_argument("--data", type=Path, default=FOLDER / "data", help="folder of the demo data (.demo/data)")
    parser.add_argument("--output", type=Path, default=FOLDER / "model", help="folder to write (.demo/model)")
    for name, description in {
        "hidden": "width of the residual stream",
        "layers": "number of layers",
        "heads": "attention heads",
        "kv_heads": "key/value heads (grouped-query attention)",
        "vocab": "size of the vocabulary",
        "intermediate": "width of the feed-forward layer; 0: 8/3 of hidden",
        "context": "longest sequence, in tokens",
        "seed": "seed of the random weights",
        "experts": "experts per layer, two active per token; 0: a dense Llama",
    }.items():
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"{description} ({value})")
    parser.add_argument("--tie", action="store_true", help="share the input embedding with the output layer")
    args = vars(parser.parse_args(argv))
    data, output = args.pop("data"), args.pop("output")
    return data, output, ModelOptions(**args)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 2 after one line that names the mistake."""
    return exit_status(lambda: make_folder(argv))


def make_folder(argv: list[str] | None) -> int:
    """Write the model that the command line asks for -> 0. Raises UserError."""
    data, output, options = parse_arguments(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported, below
    count = run(data, output, options)
    print(f"tiny model {'is already in' if count is None else 'written to'} {output}")
    if count is not None:
        print(f"{count:,} parameters: {options.layers} layers of {options.hidden}, vocabulary {options.vocab}")
    return 0
