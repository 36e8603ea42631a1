"""Hugging Face models on one process, DistributedDataParallel or FSDP2."""
