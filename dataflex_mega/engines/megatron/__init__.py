"""The Megatron engine: a GPTModel of megatron-core under tensor, pipeline, sequence, expert and data parallelism."""
