"""Text files -> a corpus: one Megatron .bin/.idx pair per domain and a manifest. The entry point is `command.py`."""
