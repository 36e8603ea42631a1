"""Installing what the wheel does not ask for itself: LLaMA-Factory without its dependencies, and extras, beside a torch
that stays as it is."""
