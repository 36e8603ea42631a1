"""From a YAML and `key=value` overrides to checked values: LLaMA-Factory's keys, ours, Megatron's. Builds nothing."""
