"""LLaMA-Factory as a library. Nothing outside this folder imports `llamafactory`."""
