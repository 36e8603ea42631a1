"""Text files -> a corpus: one Megatron .bin/.idx pair a domain and a manifest. `command.py` is the way in."""
