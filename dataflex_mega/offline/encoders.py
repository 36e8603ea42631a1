"""Texts or tokens -> one vector per sample: sentence-transformers, any Hugging Face encoder, or the model being trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dataflex_mega.errors import ConfigError, UserError

EncoderKind = Literal["auto", "sentence-transformers", "encoder", "model"]
KINDS: tuple[EncoderKind, ...] = ("auto", "sentence-transformers", "encoder", "model")
SENTENCE_FILE = "modules.json"  # marks a folder of sentence-transformers


@dataclass(frozen=True)
class EmbedInput:
    """A sample to be embedded, as text and, where known, as tokens."""

    text: str
    tokens: np.ndarray | None = None  # [length] int64, as the model being trained sees it


class Encoder(Protocol):
    """Computes one vector per sample."""

    size: int  # D, numbers per vector

    def identity(self) -> dict[str, Any]:
        """The model and the settings that decide its vectors, plain values."""
        ...

    def __call__(self, inputs: Sequence[EmbedInput]) -> np.ndarray:
        """n samples -> [n, size] float32."""
        ...


@dataclass(frozen=True)
class EncoderSettings:
    """The options of the command line that decide an encoder."""

    model: str  # a folder, or a name on the hub
    kind: EncoderKind = "auto"
    max_length: int = 512  # tokens; longer samples are truncated
    batch_size: int = 32
    normalize: bool = True
    dtype: str = "float32"  # of the computation
    trust_remote_code: bool = False


def load(settings: EncoderSettings, device: torch.device) -> Encoder:
    """The encoder on a device, ready. Raises ConfigError when it cannot be loaded."""
    folder, kind = resolve_folder(settings.model), settings.kind
    if kind == "auto":
        kind = "sentence-transformers" if (folder / SENTENCE_FILE).is_file() else "encoder"
    if kind == "sentence-transformers":
        return SentenceEncoder(settings, folder, device)
    return HFEncoder(settings, folder, device, by_tokens=kind == "model")


def resolve_folder(name: str) -> Path:
    """The folder of a model, downloaded first when it is a name on the hub. Raises ConfigError when there is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(f"model: {name} is no folder, and no model of that name can be had from the hub") from error


def fingerprint(folder: Path) -> str:
    """16 digits of a hash of a folder's configuration, tokenizer and weights, names included. Raises ConfigError when it has
    no weights."""
    suffixes, excluded = (".json", ".safetensors", ".bin"), ("trainer_", "training_", "optimizer")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in suffixes]
    files = [path for path in files if not path.name.startswith(excluded)]
    if not any(path.suffix != ".json" for path in files if path.parent == folder):
        raise ConfigError(f"model: {folder} has no weights (*.safetensors or *.bin)")
    sha = hashlib.sha256()
    for path in files:
        if path.parent != folder and not (folder / SENTENCE_FILE).is_file():
            continue  # checkpoints and logs in the output folder of a run
        with path.open("rb") as stream:
            sha.update(str(path.relative_to(folder)).encode() + hashlib.file_digest(stream, "sha256").digest())
    base = adapter_base(folder)
    return sha.hexdigest()[:16] if base is None else sha.hexdigest()[:16] + "+" + fingerprint(resolve_folder(base))


def adapter_base(folder: Path) -> str | None:
    """The base model of a LoRA folder; None for a complete model."""
    path = folder / "adapter_config.json"
    return str(json.loads(path.read_text())["base_model_name_or_path"]) if path.is_file() else None


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """[n, D] -> each divided by its length; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


class SentenceEncoder:
    """A model of sentence-transformers, with its own pooling."""

    def __init__(self, settings: EncoderSettings, folder: Path, device: torch.device) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]  # optional
        except ImportError as error:
            raise ConfigError(
                "encoder: sentence-transformers is not installed (pip install 'dataflex_mega[sentence]'); --encoder encoder "
                "reads the same folder with transformers and takes the mean over tokens"
            ) from error
        self.settings, self.folder = settings, folder
        trust = settings.trust_remote_code
        self.model: Any = SentenceTransformer(str(folder), device=str(device), trust_remote_code=trust)
        longest = getattr(self.model, "max_seq_length", None)
        self.model.max_seq_length = min(settings.max_length, longest or settings.max_length)
        self.size = int(self.model.get_sentence_embedding_dimension())

    def identity(self) -> dict[str, Any]:
        return {
            "model": fingerprint(self.folder), "encoder": "sentence-transformers",
            "max_length": self.model.max_seq_length, "normalize": self.settings.normalize,
        }  # fmt: skip

    def __call__(self, inputs: Sequence[EmbedInput]) -> np.ndarray:
        texts, size = [one.text for one in inputs], self.settings.batch_size
        vectors = self.model.encode(texts, batch_size=size, convert_to_numpy=True, show_progress_bar=False)
        vectors = np.asarray(vectors, dtype=np.float32)
        return l2_normalize(vectors) if self.settings.normalize else vectors


class HFEncoder:
    """A model of transformers; a vector is the mean of the last hidden states over all tokens.

    `by_tokens`: samples with tokens are embedded by these, as the model being trained sees them.
    """

    def __init__(self, settings: EncoderSettings, folder: Path, device: torch.device, by_tokens: bool) -> None:
        from transformers import AutoTokenizer

        self.settings, self.folder, self.device, self.by_tokens = settings, folder, device, by_tokens
        try:
            self.model = _load_model(settings, folder, by_tokens).to(device).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=settings.trust_remote_code, padding_side="right"
            )
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model: {folder}: {str(error).strip().splitlines()[0]}") from error
        self.size = int(self.model.config.hidden_size)

    def identity(self) -> dict[str, Any]:
        return {
            "model": fingerprint(self.folder), "encoder": "model" if self.by_tokens else "encoder",
            "max_length": self.settings.max_length, "normalize": self.settings.normalize, "compute": self.settings.dtype,
        }  # fmt: skip

    def __call__(self, inputs: Sequence[EmbedInput]) -> np.ndarray:
        """Batches hold samples of similar length, so that there is little padding."""
        token_ids = [self._token_ids(one) for one in inputs]
        order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        vectors = np.zeros((len(token_ids), self.size), dtype=np.float32)
        for start in range(0, len(order), self.settings.batch_size):
            batch = order[start : start + self.settings.batch_size]
            vectors[batch] = self._embed_batch([token_ids[i] for i in batch]).cpu().numpy()
        return l2_normalize(vectors) if self.settings.normalize else vectors

    def _token_ids(self, sample: EmbedInput) -> list[int]:
        if self.by_tokens and sample.tokens is not None:
            highest = int(sample.tokens.max(initial=0))
            if highest >= self.model.config.vocab_size:
                raise UserError(
                    f"model: {self.folder} knows {self.model.config.vocab_size} tokens, a sample has {highest}"
                )
            return sample.tokens[: self.settings.max_length].tolist()
        return self.tokenizer(sample.text, truncation=True, max_length=self.settings.max_length)["input_ids"]

    def _embed_batch(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """[b] token lists -> [b, size] float32. A sample without tokens is a zero vector."""
        width = max(1, max(len(ids) for ids in token_ids))
        input_ids = torch.zeros(len(token_ids), width, dtype=torch.int64)
        mask = torch.zeros(len(token_ids), width, dtype=torch.int64)
        for row, ids in enumerate(token_ids):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[row, : len(ids)] = 1
        input_ids, mask = input_ids.to(self.device), mask.to(self.device)
        with torch.no_grad():
            states = self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bs,bsh->bh", weights, states)


def _load_model(settings: EncoderSettings, folder: Path, causal: bool) -> Any:
    """The model without its output layer, with the adapter of a LoRA folder."""
    from transformers import AutoModel, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "trust_remote_code": settings.trust_remote_code}
    if not causal:
        return AutoModel.from_pretrained(folder, **options)
    base = adapter_base(folder)
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, **options).base_model
    from peft import PeftModel

    base_model: Any = AutoModelForCausalLM.from_pretrained(resolve_folder(base), **options)
    return PeftModel.from_pretrained(base_model, folder).get_base_model().base_model
