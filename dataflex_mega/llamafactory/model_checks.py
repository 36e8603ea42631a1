"""Whether the model that a configuration names is the one it asks for, found out before a model is built.

The model is laid out without memory (on torch's meta device) and its weights are matched by name and shape, as transformers
does when it loads them, but not read. transformers would fill what is missing with random numbers and drop what is left
over.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from dataflex_mega.data.collate import PAD_TO_MULTIPLE
from dataflex_mega.errors import ConfigError, did_you_mean
from dataflex_mega.folder_hints import not_an_adapter
from dataflex_mega.llamafactory.args import FAILURES, LFArgs, first_line

# What comes out of transformers, peft and safetensors for a model that they cannot read.
UNREADABLE = (*FAILURES, SafetensorError, StrictDataclassError, UnpicklingError, EOFError)
NAMED = 3  # weights in a message
# Weights of older files that no model has any more: buffers which are computed.
COMPUTED = re.compile(r"(rotary_emb\.|inv_freq$|masked_bias$|attn\.bias$|position_ids$|rotary_pos_emb)")
IN_A_LAYER = re.compile(r"\.\d+\.")
POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|pos_embeddings?|embed_position)$")
# Model type -> the key of its configuration for the length of a table of positions that is no embedding.
FIXED_TABLES = {
    "gptj": "max_position_embeddings", "codegen": "max_position_embeddings", "ctrl": "n_positions", "mpt": "max_seq_len",
}  # fmt: skip


def check_model(args: LFArgs, tokenizer: Any, loads_weights: bool = True) -> list[str]:
    """Check the model against the keys that speak of it -> messages for the user.

    Raises ConfigError naming the key. `loads_weights`: whether they come from model_name_or_path.
    """
    source = str(args.model.model_name_or_path)
    config = read_config(args)
    _check_rope(args, config)
    _check_pissa(args)
    _check_vocabulary(args, tokenizer, getattr(config.get_text_config(), "vocab_size", None))
    weights = loads_weights and not args.model.train_from_scratch
    preview = preview_model("model_name_or_path", source, config, hub_options(args), weights)
    notes = _check_length(args, config, preview)
    if preview is not None:
        _check_vocabulary(args, tokenizer, int(preview.get_input_embeddings().weight.shape[0]))
        _check_trained_parts(args, config, preview)
        for adapter in args.model.adapter_name_or_path or ():
            preview = _check_adapter(str(adapter), preview)
    return notes


def hub_options(args: LFArgs) -> dict[str, Any]:
    """What from_pretrained is called with, beside the name."""
    model = args.model
    return {
        "trust_remote_code": model.trust_remote_code, "cache_dir": model.cache_dir, "revision": model.model_revision,
        "token": model.hf_hub_token,
    }  # fmt: skip


def read_config(args: LFArgs) -> Any:
    """The model's configuration. Raises ConfigError naming config.json."""
    from transformers import AutoConfig

    source = str(args.model.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(source, **hub_options(args))
    except UNREADABLE as error:
        raise ConfigError(f"model_name_or_path {source!r}: config.json: {first_line(error)}") from error


# -- weights -------------------------------------------------------------------------------------------------------------


def preview_model(key: str, source: str, config: Any, options: dict[str, Any], loads_weights: bool = True) -> Any:
    """The model without memory; None for a quantised one, and for one whose own code needs memory.

    Raises ConfigError naming `key`, the files and the first names when weights are missing, left over or of another shape.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        return None
    auto = auto_class(config)
    try:
        with _quiet():
            if not loads_weights:
                with torch.device("meta"):
                    return auto.from_config(config, trust_remote_code=options["trust_remote_code"])
            model, found = auto.from_pretrained(
                source, config=config, device_map={"": "meta"}, output_loading_info=True, ignore_mismatched_sizes=True,
                **options,
            )  # fmt: skip
    except UNREADABLE as error:
        if getattr(config, "auto_map", None):
            return None
        raise ConfigError(f"{key} {source!r}: {damaged_file(source) or first_line(error)}") from error
    _check_weights(key, source, found)
    return model


def damaged_file(source: str) -> str | None:
    """The first safetensors file of a folder that cannot be read, and why; None when all can."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file.name} cannot be read as safetensors: {first_line(error)}"
    return None


def auto_class(config: Any) -> Any:
    """Which of transformers' classes LLaMA-Factory loads such a model with."""
    import transformers

    for name in ("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTextToWaveform"):
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModelForCausalLM


def _check_weights(key: str, source: str, found: dict[str, Any]) -> None:
    where = f"{key} {source!r}"
    mismatched: list[Any] = sorted(found.get("mismatched_keys") or (), key=str)
    if mismatched:
        name, in_file, in_model = mismatched[0]
        raise ConfigError(
            f"{where}: {name}{_more(len(mismatched) - 1)} has shape {list(in_file)} in the files and {list(in_model)} in "
            "the model that config.json describes"
        )
    missing = sorted(map(str, found.get("missing_keys") or ()))
    if missing:
        raise ConfigError(
            f"{where}: {len(missing)} weights of the model that config.json describes are not in its files: "
            f"{_some(missing)}; they would be random numbers"
        )
    left = sorted(map(str, found.get("unexpected_keys") or ()))
    left = [name for name in left if IN_A_LAYER.search(name) and not COMPUTED.search(name)]
    if left:
        raise ConfigError(
            f"{where}: its files have {len(left)} weights that the model which config.json describes does not have: "
            f"{_some(left)}; they would be dropped"
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:NAMED])}{_more(len(names) - NAMED)}"


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers reports nothing: what is wrong is raised, in one line."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


# -- keys ----------------------------------------------------------------------------------------------------------------


def _check_vocabulary(args: LFArgs, tokenizer: Any, rows: Any) -> None:
    """`rows`: of the embedding, where that is known."""
    if isinstance(rows, int) and len(tokenizer) > rows and not args.model.resize_vocab:
        template = f" with those of template {args.data.template!r}" if args.data.template else ""
        raise ConfigError(
            f"model_name_or_path {args.model.model_name_or_path!r}: the tokenizer has {len(tokenizer)} tokens{template}, "
            f"the model's embedding {rows} rows; resize_vocab: true adds rows (with engine: fsdp)"
        )


def _check_length(args: LFArgs, config: Any, model: Any) -> list[str]:
    """Messages. Raises ConfigError for rows that are longer than the model has positions."""
    length = int(args.data.cutoff_len)
    if check_positions(length, config, model, "the model"):
        return []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions and args.model.rope_scaling is None:
        return [
            f"cutoff_len: {length} is more than the {positions} positions that the model was made for; see rope_scaling"
        ]
    return []


def check_positions(length: int, config: Any, model: Any, name: str) -> bool:
    """Whether a model has a table of positions. Raises ConfigError when it is shorter than rows of `length` tokens."""
    text = config.get_text_config()
    if model is not None and text is not config:  # the positions of an image tower are those of its patches
        model = model.get_decoder()
    limit, table = _table_of_positions(text, model)
    width = -(-length // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE
    if limit is not None and width > limit:
        padded = "" if width == length else f" (rows are padded to {width})"
        raise ConfigError(f"cutoff_len: {length}{padded} is beyond the {limit} positions that {name} has ({table})")
    return limit is not None


def _table_of_positions(config: Any, model: Any) -> tuple[int | None, str]:
    """(How many positions a model has a table of, its name); None for a model that computes positions."""
    key = FIXED_TABLES.get(str(config.model_type))
    if key is not None:
        return int(getattr(config, key)), f"{key} in config.json"
    for name, module in [] if model is None else model.named_modules():
        if isinstance(module, torch.nn.Embedding) and POSITION_TABLE.search(name):
            return module.num_embeddings - int(getattr(module, "offset", 0)), name
    return None, ""


def _check_rope(args: LFArgs, config: Any) -> None:
    """Raises ConfigError for a rope_scaling that there is not, that does nothing, or that transformers refuses."""
    from llamafactory.extras.constants import RopeScaling
    from llamafactory.model.model_utils.rope import configure_rope

    value = args.model.rope_scaling
    if value is None:
        return
    name, known = str(getattr(value, "value", value)), [str(scaling.value) for scaling in RopeScaling]
    if name not in known:
        raise ConfigError(
            f"rope_scaling: there is no {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    if not hasattr(config, "rope_scaling") and not hasattr(config, "rope_parameters"):
        raise ConfigError(
            f"rope_scaling: {name} has no effect: model type {config.model_type!r} has no rotary positions"
        )
    try:
        with _quiet():
            configure_rope(copy.deepcopy(config), args.model)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"rope_scaling: {name} cannot be applied to model type {config.model_type!r} with cutoff_len "
            f"{args.data.cutoff_len}: {reason}; write rope_parameters and max_position_embeddings into the model's "
            "config.json instead"
        ) from error


def _check_pissa(args: LFArgs) -> None:
    tuning = args.finetuning
    if tuning.pissa_init and tuning.pissa_iter != -1:
        raise ConfigError(
            f"pissa_iter: {tuning.pissa_iter} begins from a random decomposition, which changes the model and cannot be "
            "made again, so the adapter would not belong to the model that it is loaded on; pissa_iter: -1 is exact"
        )


def _check_trained_parts(args: LFArgs, config: Any, model: Any) -> None:
    tuning = args.finetuning
    if tuning.finetuning_type == "freeze":
        _check_freeze(tuning, config)
    trains_new_adapter = args.model.adapter_name_or_path is None or tuning.create_new_adapter
    if tuning.finetuning_type in ("lora", "oft") and trains_new_adapter:
        names = [name for name, _ in model.named_modules()]
        targets = [] if list(tuning.lora_target) == ["all"] else list(tuning.lora_target)
        _check_names("lora_target", targets, names)
        _check_names("additional_target", list(tuning.additional_target or ()), names)


def _check_freeze(tuning: Any, config: Any) -> None:
    text, count = config.get_text_config(), tuning.freeze_trainable_layers
    keys = ("num_hidden_layers", "num_layers", "n_layer")
    layers = next((getattr(text, key) for key in keys if getattr(text, key, None)), None)
    if layers is not None and abs(count) > layers:
        raise ConfigError(f"freeze_trainable_layers: {count} of a model with {layers} layers")
    if count == 0 and not tuning.freeze_extra_modules:
        raise ConfigError("freeze_trainable_layers: 0 trains nothing; expected the last n layers, or -n for the first")


def _check_names(key: str, wanted: Iterable[str], names: list[str]) -> None:
    """Raises ConfigError for a name that no module ends with: peft passes over it as long as another one is found."""
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted(
                {name.rpartition(".")[2] for name in names if name and not name.rpartition(".")[2].isdecimal()}
            )
            raise ConfigError(
                f"{key}: no module {target!r} in the model{did_you_mean(target, known)}; it has {', '.join(known)}"
            )


# -- adapters ------------------------------------------------------------------------------------------------------------


def _check_adapter(source: str, model: Any) -> Any:
    """The model without the adapter again. Raises ConfigError when its weights are not those of its configuration."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    folder, where = Path(source), f"adapter_name_or_path {source!r}"
    if not folder.is_dir():
        return model  # a name on a hub, or a mistake that is found when it is loaded
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{where}: no adapter_config.json{not_an_adapter(folder)}")
    try:
        config = PeftConfig.from_pretrained(source)
        start = str(getattr(config, "init_lora_weights", ""))
        config.init_lora_weights = False  # type: ignore[attr-defined]
        config.inference_mode = True
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        weights: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)  # type: ignore[arg-type]
        wanted = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        found = _adapter_shapes(folder)
        plain = adapted.unload()  # type: ignore[operator]
    except UNREADABLE as error:
        raise ConfigError(f"{where}: {damaged_file(source) or first_line(error)}") from error
    if start.startswith("pissa_niter"):
        raise ConfigError(
            f"{where}: made with pissa_init and pissa_iter, its model cannot be made again; see pissa_convert"
        )
    if found is not None:
        _compare_adapter(where, wanted, found)
    return plain


def _adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """The weights of an adapter's file; None when there is none that can be looked into without reading it."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(str(file), framework="pt") as stored:
        return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118  # not a dict


def _compare_adapter(where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ConfigError(f"{where}: {len(missing)} weights of the adapter are not in its file: {_some(missing)}")
    left = sorted(name for name in set(found) - set(wanted) if "lora_" in name or "oft_" in name)
    if left:
        raise ConfigError(f"{where}: its file has {len(left)} weights for which the model has no place: {_some(left)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ConfigError(f"{where}: {name} has shape {list(found[name])}; on this model it has {list(shape)}")
