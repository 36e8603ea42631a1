"""The processor of a model that takes images, videos or audio, also where its part for videos cannot be loaded.

LLaMA-Factory goes on without a processor when transformers cannot make one, and fails at the first row. The video processor
of Qwen-VL and its like needs torchvision; their images do not.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex_mega.errors import ConfigError
from dataflex_mega.llamafactory.args import FAILURES, LFArgs, first_line
from dataflex_mega.llamafactory.model_checks import hub_options

IMAGES_ALONE = (
    "Qwen2VLPlugin",
    "Qwen3VLPlugin",
    "GLM4VPlugin",
)  # plugins that ask a processor for no more than its parts
OTHER_FILES = ("video_preprocessor_config.json", "processor_config.json")


def takes_media(template: Any) -> bool:
    """Whether a template has a place for images, videos or audio."""
    plugin = template.mm_plugin
    return any(getattr(plugin, f"{kind}_token") is not None for kind in ("image", "video", "audio"))


@dataclass
class ImagesAlone:
    """The part of a processor that makes pixels of images, for LLaMA-Factory's plugins."""

    image_processor: Any
    source: Path  # the model's folder

    @property
    def video_processor(self) -> Any:
        """Whose sizes plugins read, also without a video."""
        return self.image_processor

    @property
    def model_input_names(self) -> list[str]:
        return list(self.image_processor.model_input_names)

    def save_pretrained(self, folder: Path) -> None:
        """Write the part, and what the model's folder has for the others."""
        self.image_processor.save_pretrained(folder)
        for name in OTHER_FILES:
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, Path(folder) / name)


def complete_processor(args: LFArgs, module: dict[str, Any], template: Any) -> None:
    """Put what can be had into `module` where LLaMA-Factory found no processor for a template that needs one."""
    if module.get("processor") is not None or type(template.mm_plugin).__name__ not in IMAGES_ALONE:
        return
    from llamafactory.model.patcher import patch_processor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    with contextlib.suppress(*FAILURES):
        images = AutoImageProcessor.from_pretrained(
            str(args.model.model_name_or_path), backend="pil", **hub_options(args)
        )
        processor: Any = ImagesAlone(images, Path(str(args.model.model_name_or_path)))
        patch_processor(processor, module["tokenizer"], args.model)
        module["processor"] = processor


def check_processor(args: LFArgs, module: dict[str, Any], template: Any) -> None:
    """Raises ConfigError with the cause when a template needs a processor and the model's cannot be loaded."""
    if module.get("processor") is not None or args.finetuning.stage == "pt" or not takes_media(template):
        return
    from transformers import AutoProcessor

    cause = "its folder has none"
    try:
        AutoProcessor.from_pretrained(str(args.model.model_name_or_path), **hub_options(args))
    except FAILURES as error:
        cause = first_line(error).partition(". ")[0]  # transformers goes on with where to read about installing
    remedy = "; pip install 'dataflex_mega[vision]'" if "orchvision" in cause else ""
    raise ConfigError(
        f"template: {args.data.template} needs the processor of model_name_or_path {args.model.model_name_or_path!r}: "
        f"{cause}{remedy}"
    )
