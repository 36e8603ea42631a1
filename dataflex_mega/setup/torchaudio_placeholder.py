"""A placeholder. LLaMA-Factory imports `torchaudio` at module level and uses it only to load audio files."""

__version__ = "2.4.0+placeholder"


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ImportError(
        f"torchaudio.{name}: only a placeholder is installed; audio needs a torchaudio built for this torch"
    )
