"""From a checked configuration to the parts of a run."""
