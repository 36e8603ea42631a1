"""Fields of a dataclass as a configuration writes them: which types and ranges they declare, and values that fit them."""
