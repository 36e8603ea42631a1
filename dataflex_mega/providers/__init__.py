"""The signals that algorithms ask for, one file each. See `registry` for how a provider is entered."""
