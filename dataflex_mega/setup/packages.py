"""What is installed beside the wheel's own dependencies, and what of LLaMA-Factory's is left out. Standard library only:
tools/setup_env.py reads it with a Python that has nothing installed.

LLaMA-Factory asks for torchvision and torchaudio. The wheels of these that package indexes serve for Linux are CUDA
builds: they replace a CPU torch by a CUDA one or cannot be imported beside it, and a torchvision that is present but broken
makes every model class of `transformers` unimportable. Training on text needs neither. So LLaMA-Factory is installed
without its dependencies, and those that training imports are dependencies of this package, in LLaMA-Factory's ranges.
"""

from __future__ import annotations

from dataflex_mega.setup.versions import requirement_name

LLAMAFACTORY = "llamafactory==0.9.5"  # the version whose needs are known; see pyproject.toml
LLAMAFACTORY_VERSIONS = ">=0.9.5,<0.10"  # what is accepted where one is installed already
# Not imported on the training path (the first two cannot be, beside a CPU torch): chat servers, web UI, other hubs.
NOT_NEEDED = {
    "torchvision", "torchaudio", "torch", "gradio", "modelscope", "fastapi", "uvicorn", "sse-starlette", "fire", "tyro",
    "tiktoken", "torchdata", "hf-transfer", "einops", "av", "librosa",
}  # fmt: skip
# Extra -> what it is for.
EXTRAS = {
    "llamafactory": "LLaMA-Factory with all that it asks for, torchvision and torchaudio too",
    "serve": "`dataflex-cli api`: an OpenAI-style server",
    "webui": "`dataflex-cli webui` and `webchat`",
    "megatron": "`engine: megatron`",
    "quant": "quantised LoRA: bitsandbytes, HQQ",
    "optimizers": "GaLore, APOLLO, Adam-mini, StableAdamW, those of bitsandbytes",
    "vision": "images and video",
    "trackers": "`report_to`: wandb, swanlab, mlflow, trackio",
    "metrics": "`predict_with_generate`: ROUGE and BLEU",
    "offline": "`embed`, `near`, `tsds` with approximate search, .zst files",
    "sentence": "embeddings of sentence-transformers",
}
# Packages that transformers or peft import when they are there, so that a broken one breaks them.
IMPORTED_WHEN_PRESENT = ("hqq", "torchao", "bitsandbytes", "liger-kernel", "deepspeed", "flash-attn", "gptqmodel")
MODULES = {"pyyaml": "yaml", "protobuf": "google.protobuf", "pillow": "PIL", "scikit-learn": "sklearn"}
MODULES |= {"faiss-cpu": "faiss", "megatron-core": "megatron.core", "torch-optimi": "optimi"}
MODULES |= {"hqq": "hqq.core.quantize", "torchao": "torchao.quantization"}  # what is imported; the top is empty


def module_of(distribution: str) -> str:
    """The module by which a distribution is imported: `sse-starlette` -> `sse_starlette`."""
    return MODULES.get(distribution, distribution.replace("-", "_"))


def llamafactory_requirements(requires: list[str]) -> list[str]:
    """The requirements of llamafactory without its extras and without what text training never imports."""
    return [line for line in requires if "extra ==" not in line and requirement_name(line) not in NOT_NEEDED]


def last_error(output: str) -> str:
    """The line by which pip or uv says why it failed: the last that says `error`, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no output"])[-1]
