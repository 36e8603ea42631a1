"""The signals that algorithms ask for, one file each, and the registry that finds them."""
