"""Loss forms: what a step differentiates of a token instead of its cross-entropy, one file each."""
